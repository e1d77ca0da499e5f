"""Whether a checkpoint is what folding an adapter into a base gives, tensor by tensor.

It is computed from files alone, apart from the rules that fold: `W + change` in float64, compared
with what is there. One rounding to the dtype of the files explains a difference, no more. Where
`fold --mode residual` (or `keep`) left some of the change in `adapter/`, the files have to hold the
rest, `W + change - what adapter/ adds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .exporters.adapter_changes import ROWS, Described, Place, describe, rows_of, size_of
from .exporters.base import checkpoint
from .exporters.formats import format_of, in_out_of
from .rewriter.errors import BaseNeededError, CorruptFileError
from .rewriter.files.job import record_of
from .rewriter.parts.parts import Scaling
from .rewriter.storage.safetensors_checkpoint import Checkpoint, header
from .rewriter.storage.stream import BESIDE, RECORD

WITH_REST = f"with {BESIDE}/"
_SLACK = 8.0
"""Roundings of the largest change that summing its products may take, in float32 or wider."""


@dataclass(frozen=True)
class Verdict:
    """One tensor.

    Attributes:
        name: in the files.
        state: `equal` (bit for bit), `folded` (as expected, up to one rounding), `with adapter/`
            (the same, with what that adds), `differs`, `not folded` (as in the base, though the
            adapter changes it), `missing`, `extra`, `other shape`.
        roundings: the largest difference, in roundings; 0 where it is not computed.
        present: which part of the learnt change is there, with `adapter/`: 1 once, 0 not at all, 2
            twice.
    """

    name: str
    state: str
    roundings: float = 0.0
    present: float | None = None

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.state in ("equal", "folded", WITH_REST)


def opened(path: str | Path) -> Checkpoint:
    """A directory of safetensors files, or one such file.

    Raises:
        ArtifactError: (CorruptFileError) there is none, or it is damaged.
    """
    file = Path(path)
    if not file.is_file():
        return Checkpoint.read(file)
    entries = header(file)
    return Checkpoint(file.parent, None, {file.name: tuple(entries)}, entries)


def rest_beside(path: str | Path) -> Described | None:
    """The adapter that a fold left beside the files it wrote; None where it left none.

    Args:
        path: of a folded checkpoint.

    Raises:
        CorruptFileError: the folder's record says that there is one, and there is not.
        ArtifactError: it is damaged, or does not fit.
    """
    folder = Path(path) / BESIDE
    if folder.is_dir():
        return describe(folder, checkpoint(path, format_of(folder) == "peft" and in_out_of(folder)))
    left = (record_of(path, RECORD) or {}).get("beside", []) if Path(path).is_dir() else []
    if left:
        raise CorruptFileError(
            f"{folder} is missing: {RECORD} says that it has what was not folded at {len(left)} "
            f"weights, first {left[0]}. Put it back, or fold again."
        )
    return None


def check_merge(
    base: Checkpoint,
    aliases: Mapping[str, str],
    adapter: Described,
    merged: Checkpoint,
    rest: Described | None = None,
) -> Iterator[Verdict]:
    """Judges every tensor of both checkpoints; memory holds pieces of one tensor at a time.

    Args:
        base: what was folded into.
        aliases: other names of its tensors.
        adapter: read with that base.
        merged: what folding is said to have written.
        rest: what is not folded, see `rest_beside`.

    Raises:
        BaseNeededError: what the adapter does is not told by its files.
    """
    changed = _by_target(base, aliases, adapter)
    beside = {} if rest is None else _by_target(base, aliases, rest)
    transposed = _are_transposed(base, changed)
    scaled_biases = _scaled_biases(base, changed)
    for name in base.entries:
        if name not in merged.entries:
            yield Verdict(name, "missing")
        elif merged.entries[name].shape != base.entries[name].shape:
            yield Verdict(name, "other shape")
        else:
            old, new = base.mapped(name), merged.mapped(name)
            if name in changed or name in beside:
                left = beside.get(name, [])
                yield _folded(name, old, new, changed.get(name, []), left, transposed)
            elif name in scaled_biases:
                yield _judged(name, [_scaled_bias(old, new, scaled_biases[name])], new.dtype)
            else:
                yield _kept(name, old, new)
    for name in merged.entries.keys() - base.entries.keys():
        stored = aliases.get(name, name)
        if stored in base.entries and torch.equal(merged.mapped(name), merged.mapped(stored)):
            continue  # the same tensor by another name
        yield Verdict(name, "extra")


def _by_target(
    base: Checkpoint, aliases: Mapping[str, str], adapter: Described
) -> dict[str, list[Place]]:
    changed: dict[str, list[Place]] = {}
    for place in adapter.places:
        name = aliases.get(place.target, place.target)
        if name not in base.entries or (place.change is None and place.unknown):
            why = place.unknown or "no tensor of the base has its name"
            raise BaseNeededError(
                f"{adapter.path}: what folding {place.target or 'it'} ({place.method}) gives is "
                f"not told by its files: {why}. Convert it first, where PEFT has a form for it "
                "(peftfx convert ADAPTER OUT --to peft --base MODEL), or fold it with peftfx fold, "
                "which measures what it does."
            )
        changed.setdefault(name, []).append(place)
    return changed


def _are_transposed(base: Checkpoint, changed: Mapping[str, Sequence[Place]]) -> bool:
    """Whether matrices are stored `[in, out]`, as those that are not square tell."""
    for name, places in changed.items():
        shape = base.entries[name].shape
        sizes = [size_of(p.change) for p in places if p.change is not None]
        if len(shape) == 2 and shape[0] != shape[1] and sizes:
            return sizes[0] == shape[::-1]
    return False


def _scaled_biases(
    base: Checkpoint, changed: Mapping[str, Sequence[Place]]
) -> dict[str, list[Tensor]]:
    """Biases that outputs' scales multiply, too."""
    found: dict[str, list[Tensor]] = {}
    for name, places in changed.items():
        bias = f"{name.removesuffix('.weight')}.bias"
        for place in places:
            if (
                isinstance(place.part, Scaling)
                and place.part.side == "out"
                and bias in base.entries
            ):
                found.setdefault(bias, []).append(place.part.vector.double())
    return found


Piece = tuple[Tensor, Tensor, Tensor, Tensor | float]
"""What was there, what should be there, and what is, float64; and which part of the change is not
in the files."""


def _scaled_bias(old: Tensor, new: Tensor, scales: Sequence[Tensor]) -> Piece:
    wanted = old.double()
    for scale in scales:
        wanted = wanted * scale
    return old.double(), wanted, new.double(), 0.0


def _folded(
    name: str,
    old: Tensor,
    new: Tensor,
    places: Sequence[Place],
    rest: Sequence[Place],
    transposed: bool,
) -> Verdict:
    before, after = (t.mT if transposed and t.dim() == 2 else _flat(t) for t in (old, new))
    verdict = _judged(name, _pieces(name, before, after, places, rest), new.dtype)
    if rest:
        return replace(verdict, state=WITH_REST) if verdict.good else verdict
    if not verdict.good and torch.equal(old.to(new.dtype), new):
        return Verdict(name, "not folded", verdict.roundings, 0.0)
    return verdict


def _flat(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.dim() < 2 else tensor.flatten(1)


def _pieces(
    name: str, old: Tensor, new: Tensor, places: Sequence[Place], rest: Sequence[Place]
) -> Iterator[Piece]:
    scales = [p.part for p in places if isinstance(p.part, Scaling)]
    additive = [p.change for p in places if not isinstance(p.part, Scaling)]
    changes = [c for c in additive if c is not None]
    left = [p.change for p in rest if p.change is not None]
    for change in (*changes, *left):
        if size_of(change) != tuple(old.shape):
            if size_of(change) == (old.numel() // (c := size_of(change)[1]), c):
                old, new = old.reshape(-1, c), new.reshape(-1, c)
            else:
                raise BaseNeededError(
                    f"{name}: how its {list(old.shape)} hold a change of {list(size_of(change))} "
                    "is not told by files. Fold it with peftfx fold, which measures what it does."
                )
    streams, others = ([rows_of(change, ROWS) for change in own] for own in (changes, left))
    for at in range(0, len(old), ROWS):
        before = old[at : at + ROWS].double()
        wanted = before
        for stream in streams:
            wanted = wanted + next(stream)
        for scale in scales:
            vector = scale.vector.double()
            wanted = wanted * (vector[at : at + ROWS, None] if scale.side == "out" else vector)
        beside = torch.zeros_like(before)
        for stream in others:
            beside += next(stream)
        yield before, wanted, new[at : at + ROWS].double(), beside


def _judged(name: str, pieces: Iterator[Piece] | Sequence[Piece], dtype: torch.dtype) -> Verdict:
    eps = torch.finfo(dtype).eps
    sums = torch.finfo(dtype if eps < 1e-7 else torch.float32).eps
    worst = product = square = 0.0
    for before, wanted, got, beside in pieces:
        change, got = wanted - before, got + beside
        stored = before.abs() + (wanted - beside).abs()
        allowed = eps * stored + _SLACK * sums * change.abs().max()
        allowed = allowed + torch.finfo(dtype).smallest_normal
        worst = max(worst, float(((got - wanted).abs() / allowed).max()))
        product += float(((got - before) * change).sum())
        square += float(change.square().sum())
        if not torch.isfinite(got).all():
            worst = float("inf")
    present = product / square if square else None
    return Verdict(name, "folded" if worst <= 1 else "differs", worst, present)


def _kept(name: str, old: Tensor, new: Tensor) -> Verdict:
    """A tensor that the adapter leaves alone."""
    if old.dtype == new.dtype:
        return Verdict(name, "equal" if torch.equal(old, new) else "differs")
    if not (old.is_floating_point() and new.is_floating_point()):
        return Verdict(name, "differs")
    same = torch.equal(old.to(new.dtype), new)
    return Verdict(name, "folded" if same else "differs")
