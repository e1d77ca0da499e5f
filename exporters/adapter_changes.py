"""What an adapter changes, place by place, without its model: read from its files, and from those
of its base where a formula needs them.

A place is a stored tensor. Its change is a pair of factors or a matrix; where that depends on
numbers of a base that is not given, or is no change of a tensor at all, the place says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from ..rewriter.errors import ArtifactError, BaseMismatchError, BaseNeededError
from ..rewriter.parts.formula_parts import Formula
from ..rewriter.parts.parts import Change, LowRank, Part, Rows, Scaling, Trained
from ..rewriter.pipeline.by_site import site_of
from ..rewriter.pipeline.passes import Saved
from ..rewriter.storage.artifact import Artifact
from ..rewriter.storage.artifact import read as read_artifact
from .base import Base, Files, require_fit
from .formats import base_of_files, format_of, read_adapter, require_component
from .hf_peft.adapter import peft_parts
from .hf_peft.config import CONFIG
from .plain_lora import change_of
from .raw_adapter import Raw, raw_adapter

ROWS = 1024
"""Rows of a change that are multiplied out at a time."""

NEEDS_BASE = "needs --base"
"""Why a change is not known: it depends on numbers of the base."""

NEEDS_MODEL = "of a captured model: peftfx fold"
"""It depends on what the model's calls do, too."""


@dataclass(frozen=True)
class Factors:
    """A change `b a`, of one matrix or of a stack.

    Attributes:
        a: float64 `[..., rank, in]`.
        b: float64 `[..., out, rank]`, with the scale.
    """

    a: Tensor
    b: Tensor

    def product(self, other: Factors) -> float:
        """The sum of the products of all elements of two changes."""
        return float(((self.b.mT @ other.b) * (self.a @ other.a.mT)).sum())

    def rows(self) -> Iterator[Tensor]:
        """The change in pieces of at most `ROWS` rows of one matrix."""
        stacks = (t.reshape(-1, *t.shape[-2:]) for t in (self.b, self.a))
        for left, right in zip(*stacks, strict=True):
            for piece in left.split(ROWS):
                yield piece @ right


@dataclass(frozen=True)
class Place:
    """What an adapter has for one stored tensor, or at one module of another kind.

    Attributes:
        target: the tensor's original name, or where the file says that it is.
        method: of the change (`lora`, `dora`, `(ia)3`, `trained`, ...).
        rank, scale: of a pair of factors, else None.
        parameters: how many numbers the file has for it.
        dtypes: of these numbers.
        change: see the module; None where it is not known.
        unknown: why it is not.
        part: what the file has there, where its format was understood.
    """

    target: str
    method: str
    parameters: int
    dtypes: tuple[str, ...]
    rank: int | None = None
    scale: float | None = None
    change: Factors | Tensor | None = None
    unknown: str = ""
    part: Part | None = None

    @property
    def norm(self) -> float | None:
        """The Frobenius norm of the change."""
        squared = None if self.change is None else inner(self.change, self.change)
        return None if squared is None else max(squared, 0.0) ** 0.5

    @property
    def alpha(self) -> float | None:
        """Of a pair of factors, as most files say it: rank x scale."""
        return None if self.rank is None or self.scale is None else self.rank * self.scale


@dataclass(frozen=True)
class Described:
    """An adapter as its files tell it.

    Attributes:
        path, format: where it is, and what it is of.
        methods: that it uses.
        base: what it was trained on, as far as its files say.
        places: in the order of the file.
        size: of its tensors, in bytes.
        notes: what whoever reads on has to know.
    """

    path: str
    format: str
    methods: tuple[str, ...]
    base: str
    places: tuple[Place, ...]
    size: int
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(p.parameters for p in self.places)


def describe(path: str | Path, base: Files | None = None, component: str = "") -> Described:
    """Reads an adapter of any format.

    Args:
        path: a directory or a file.
        base: the files of its model (`base.checkpoint`), for changes that depend on them.
        component: see `load_adapter`.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) it is damaged, or none that is known;
            (BaseMismatchError) it does not fit the base.
    """
    kind = format_of(path)
    require_component(kind, path, component)
    if kind == "peftfx":
        return _of_artifact(str(path), read_artifact(path), base)
    raw = raw_adapter(path, kind)
    places, notes = _places(path, kind, raw, base, component)
    methods = tuple(dict.fromkeys([raw.method] if raw.method else [p.method for p in places]))
    return Described(str(path), kind, methods, raw.base, places, raw.size, notes, raw.about)


def _places(
    path: str | Path, kind: str, raw: Raw, base: Files | None, component: str
) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """By the format's reader where it can tell without the model, else as the tensors are named."""
    if kind == "adapterhub":
        return tuple(_raw_places(raw, NEEDS_MODEL)), ()
    own = base
    try:
        own = base_of_files(path, kind, raw.shapes) if base is None else base
        parts = read_adapter(own, path, component)
        require_fit(own, parts, str(path))
    except (BaseNeededError, BaseMismatchError):
        if base is not None:
            raise
        peft = (path, own) if kind == "peft" and own is not None else None
        return tuple(_raw_places(raw, NEEDS_BASE, peft)), ()
    return tuple(place_of(part, own) for part in parts.parts), parts.notes


def _raw_places(
    raw: Raw, unknown: str, peft: tuple[str | Path, Files] | None = None
) -> Iterator[Place]:
    """Module by module: what one needs the base for, others may not.

    Args:
        unknown: why what is not told is not.
        peft: where it is, of PEFT, and the base as far as its own factors tell it.
    """
    for module, leaves in raw.modules().items():
        tensors = {leaf: raw.tensors[name] for leaf, name in leaves.items()}
        if peft and (own := _peft_places(*peft, raw, leaves.values())):
            yield from own
        elif part := raw.factors.get(module) or _raw_factors(module, tensors, raw.alpha):
            yield place_of(part, None)
        else:
            beside = any(word in name for name in leaves.values() for word in _NO_CHANGE)
            why = "no change of a weight" if beside else unknown
            whole = peft and {*leaves} <= {"", "weight"}
            method = "trained" if whole else raw.method.lower() or "-"
            yield _place(module, method, tensors.values(), unknown=why)


_NO_CHANGE = (
    "adapters.", "prefix_tuning", "prompt_", "adapter_fusion_layer.", "prefix_gates.",
    "prefix_task_", "shared_parameters.",
)  # fmt: skip
"""In the names of what computes beside weights, in PEFT's files and AdapterHub's."""


def _peft_places(path: str | Path, own: Files, raw: Raw, names: Iterable[str]) -> tuple[Place, ...]:
    """One module of an adapter of PEFT; () where that needs the base."""
    tensors = {name: raw.tensors[name] for name in names}
    try:
        parts = peft_parts(own, raw.config, tensors, str(Path(path) / CONFIG))
        require_fit(own, parts, str(path))
    except ArtifactError:
        return ()
    return tuple(place_of(part, own) for part in parts.parts)


def _raw_factors(module: str, leaves: Mapping[str, Tensor], alpha: float) -> LowRank | None:
    """Of GGUF and kohya, whose names are not the model's, and whose factors tell all the same."""
    for first, second in (("weight.lora_a", "weight.lora_b"), _KOHYA):
        if {first, second} <= set(leaves) <= {first, second, "alpha"}:
            a, b = leaves[first].flatten(1), leaves[second].flatten(1)
            a = a if a.shape[0] == b.shape[-1] else a.mT
            said = float(leaves["alpha"]) if "alpha" in leaves else alpha
            return LowRank(module, a, b, said / a.shape[0] if said else 1.0)
    return None


_KOHYA = ("lora_down.weight", "lora_up.weight")


def _of_artifact(path: str, artifact: Artifact, base: Files | None) -> Described:
    """Of our own: the passes tell what their branches' tensors are."""
    places = [_saved_place(*saved, base) for saved in saved_parts(artifact)]
    size = sum(t.nbytes for t in artifact.tensors.values())
    recipe = "; ".join(str(item) for item, _, _ in artifact.steps)
    methods = tuple(dict.fromkeys(item.text for item, _, _ in artifact.steps if item.adapter))
    about = {"recipe": recipe, "adapters": ", ".join(artifact.adapters)}
    root = f"{len(artifact.base)} tensors, sha256 {artifact.base_root[:12]}"
    return Described(path, "peftfx", methods, root, tuple(places), size, (), about)


def _branches(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the branch that they belong to; what is trained itself is alone."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        branch, _, leaf = name.rpartition(".") if name.startswith("peftfx.") else (name, "", "")
        found.setdefault(branch, {})[leaf] = tensor
    return found


def saved_parts(
    artifact: Artifact,
) -> Iterator[tuple[str, str, Mapping[str, Tensor], Part | None]]:
    """(method, target, tensors by leaf, the part if its pass tells it) of each saved branch, and
    of what is trained itself."""
    for name, leaves in _branches(artifact.tensors).items():
        if "" in leaves:
            yield "", name, leaves, Trained(name, leaves[""])
            continue
        rest = name.removeprefix("peftfx.")
        step = next(
            (s for s in artifact.steps if s[0].adapter and rest.startswith(f"{s[0].adapter}.")),
            None,
        )
        method = rest.partition(".")[0] if step is None else step[0].text
        module, _, slot = rest.partition(".")[2].rpartition(".")
        member, _, below = module.partition(".")  # of a preset
        module = below if f"{below}.weight" in artifact.base else module
        target = f"{module}.weight" if f"{module}.weight" in artifact.base else module
        part = None
        if step is not None:
            item, plan, _ = step
            own = item.at_site(plan, site_of(plan, module))
            part = own.saved_part(Saved(target, slot, leaves, plan, member))
        yield method, target, leaves, part


def _saved_place(
    method: str, target: str, leaves: Mapping[str, Tensor], part: Part | None, base: Files | None
) -> Place:
    if part is not None:
        return place_of(part, base, method)
    tensors = [t for t in leaves.values() if t.is_floating_point()]
    return _place(target, method, tensors, unknown=NEEDS_MODEL)


def place_of(part: Part, base: Base | None, method: str = "") -> Place:
    """A part with its change.

    Args:
        part: of an adapter.
        base: the model, in files or as far as an adapter's own factors tell it; None: unknown.
        method: what to call it; by default what the part is.
    """
    tensors = [v for f in fields(part) if isinstance(v := getattr(part, f.name), Tensor)]
    rank = scale = None
    if isinstance(part, LowRank):
        rank, scale = part.a.shape[-2], part.scale
    method = method or _METHODS.get(part.kind, part.kind)
    if isinstance(part, LowRank) and part.magnitude is not None:
        method = "dora" if method == "lora" else method
    if isinstance(part, Change | Formula) and part.method:
        method = part.method.lower()
    change, unknown = _change(part, base)
    return _place(
        part.target or method, method, tensors, rank=rank, scale=scale, change=change, part=part,
        unknown=unknown,
    )  # fmt: skip


_METHODS = {"lowrank": "lora", "scaling": "(ia)3", "invoked": "alora", "rows": "trained rows"}


def _change(part: Part, base: Base | None) -> tuple[Factors | Tensor | None, str]:
    if isinstance(part, LowRank) and part.gate is not None:
        return None, "behind a gate that the input opens"
    if isinstance(part, LowRank) and part.magnitude is None:
        return Factors(part.a.double(), part.b.double() * part.scale), ""
    if isinstance(part, Change):
        return part.delta.double(), ""
    if isinstance(part, Formula) and not part.of_numbers:
        return part.change(torch.empty(0, dtype=torch.float64)), ""
    if not isinstance(part, LowRank | Formula | Scaling | Trained | Rows):
        return None, "no change of a weight"
    if base is None or (isinstance(base, Files) and base.knows == "sizes"):
        return None, NEEDS_BASE
    return change_of(base, part), ""


def _place(
    target: str, method: str, tensors: Sequence[Tensor] | Iterator[Tensor] | object, **more: object
) -> Place:
    own: list[Tensor] = list(tensors)  # pyright: ignore
    dtypes = tuple(dict.fromkeys(str(t.dtype)[6:] for t in own))
    return Place(target, method, sum(t.numel() for t in own), dtypes, **more)  # pyright: ignore


def inner(one: Factors | Tensor, other: Factors | Tensor) -> float:
    """The sum of the products of all elements of two changes of one tensor.

    Raises:
        BaseMismatchError: they have different sizes.
    """
    if isinstance(one, Factors) and isinstance(other, Factors) and _fits(one, other):
        return one.product(other)
    return sum(float((x * y).sum()) for x, y in pieces(one, other))


def pieces(one: Factors | Tensor, other: Factors | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two changes of one tensor in pieces of the same rows.

    Raises:
        BaseMismatchError: they have different sizes.
    """
    if size_of(one) != size_of(other):
        raise BaseMismatchError(
            f"one change is {list(size_of(one))} and the other {list(size_of(other))}: the "
            "adapters are of different models. Give adapters of one base."
        )
    yield from zip(rows_of(one), rows_of(other), strict=True)


def rows_of(change: Factors | Tensor, count: int = ROWS) -> Iterator[Tensor]:
    """A change `[rows, columns]` in pieces of so many rows, the last one of fewer."""
    if isinstance(change, Tensor) or change.b.dim() > 2:
        dense = torch.cat([*change.rows()]) if isinstance(change, Factors) else change
        flat = dense.reshape(1, -1) if dense.dim() < 2 else dense.flatten(1)
        yield from flat.split(count)
        return
    for piece in change.b.split(count):
        yield piece @ change.a


def size_of(change: Factors | Tensor) -> tuple[int, int]:
    """Rows, columns."""
    if isinstance(change, Factors):
        return change.b[..., 0].numel(), change.a.shape[-1]
    return (1, change.numel()) if change.dim() < 2 else (len(change), change[0].numel())


def _fits(one: Factors, other: Factors) -> bool:
    return one.a.shape[:-2] == other.a.shape[:-2] and size_of(one) == size_of(other)
