"""Checkpoints with adapters folded in, written shard by shard.

It holds one weight at a time and uses the fold rules of `edits/folding`: the same bytes as in
memory. A fold is a job (`files/job`): killed at any time, the same one goes on behind the last
whole shard, and what it writes is the same bit for bit.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..api import Program
from ..edits.folding.result import warn_of
from ..errors import BaseMismatchError, FoldError, VerifyError
from ..files.files import parse_json, write_json
from ..files.identity import merkle_root, tensor_digest, write_tensor
from ..files.job import Job, finished, job
from ..program.unchanged import require_unchanged
from .artifact import base_difference, read
from .card import CARD, whole_card
from .folding import Folder, ShardFolder
from .loading import attach
from .safetensors_checkpoint import Checkpoint, header_size

WEIGHT_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf",
                  ".onnx", ".npz", ".index.json")  # fmt: skip
"""Files that hold weights: not copied beside folded ones, which would contradict them."""

BESIDE = "adapter"
"""The folder with what was not folded, as an adapter for the folded checkpoint."""

RECORD = "peftfx-fold.json"
"""The file that says what a folded checkpoint was made of, and what is left of each change."""


@dataclass
class FoldedCheckpoint:
    """What `fold_checkpoint` wrote.

    Attributes:
        directory: the new checkpoint.
        changed: names of the tensors that folding wrote; all others are the source's bytes.
        copied, left_out: other files of the source; left out are weights in other formats.
        lost: largest share of a delta that rounding lost.
        gap: largest relative difference between a branch and what it folds into a weight.
        shares: by site, (what rounding to the storage dtype left of the change along its own
            direction, its errors relative to the size of the change).
        notes: (site, what to know about it): where rounding left nothing of what was learnt.
        beside: weights of which not all was folded; the adapter in the folder `adapter` has the
            rest, for this checkpoint.
        resumed: shards that a killed run of the same job had written.
        nothing_to_do: the directory was there already, from the same job.
    """

    directory: Path
    changed: list[str] = field(default_factory=list[str])
    copied: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    lost: float = 0.0
    gap: float = 0.0
    shares: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    beside: list[str] = field(default_factory=list[str])
    resumed: list[str] = field(default_factory=list[str])
    nothing_to_do: bool = False

    def take(self, said: Mapping[str, Any]) -> None:
        """Adds what a shard's entry in the journal says."""
        self.changed += said["changed"]
        self.shares |= {site: (left, lost) for site, (left, lost) in said["shares"].items()}
        self.notes += [(site, note) for site, note in said["notes"]]
        self.lost, self.gap = max(self.lost, said["lost"]), max(self.gap, said["gap"])

    def record(self) -> dict[str, Any]:
        """What the directory keeps of it."""
        return {
            "changed": self.changed, "copied": self.copied, "left_out": self.left_out,
            "lost": self.lost, "gap": self.gap, "shares": self.shares, "notes": self.notes,
            "beside": self.beside,
        }  # fmt: skip


def fold_checkpoint(
    program: Program,
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    adapter: str | Path | None = None,
    model: str = "",
    made_of: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> FoldedCheckpoint:
    """Folds adapters into a checkpoint directory, writing a new one with the same layout.

    Killed at any time, the same call goes on; once it is done, it does nothing more.

    Args:
        program: the captured model (the meta device is enough), with its adapters in it unless
            `adapter` is given; it is not changed.
        source: the base model's checkpoint directory; it is only read. Where its files have other
            tensors than the model, see `checkpoint_of`.
        target: a new or empty directory. It appears complete, by rename, or not at all; meanwhile
            files are in a hidden folder beside it.
        adapter: what `save` wrote; the source's hashes are checked against it.
        model: what the base is called in the card (`README.md`), by default as the source.
        made_of: strict JSON that says of what and how the target is made; by default the source's
            files, and recipe and hashes of the adapters.
        progress: called with the name of each shard before it is written.

    Raises:
        FoldError: something cannot be folded into the checkpoint's tensors, because it is not
            linear or because something else in the model reads them, or channels were cut.
        VerifyError: what was written is not what the branches compute (an error in a fold rule).
        BaseChangedError: the program's own base was changed since it was captured.
        BaseMismatchError: the adapter was trained on other weights than the source's.
        ArtifactError: source or adapter are damaged or do not fit, or the target cannot be
            written or is being written (CorruptFileError, WeightsError). In every case the target
            stays absent.
    """
    require_unchanged(program)
    expected: Mapping[str, str] | None = None
    if adapter is not None:
        artifact = read(adapter)
        expected = artifact.base
        program = attach(program, artifact, str(adapter))
    where = str(adapter or "the program")
    files = source if isinstance(source, Checkpoint) else Checkpoint.read(source)
    steps = folding(program, files, target, expected, where, made_of, model=model)
    return told(steps, progress)


def told(
    steps: Generator[str, None, FoldedCheckpoint], progress: Callable[[str], None] | None
) -> FoldedCheckpoint:
    """Takes all steps of a fold, and tells the name of each shard before."""
    with contextlib.closing(steps):
        while True:
            try:
                file = next(steps)
            except StopIteration as done:
                return done.value
            if progress is not None:
                progress(file)


def folding(
    program: Program,
    checkpoint: Checkpoint,
    target: str | Path,
    expected: Mapping[str, str] | None,
    where: str,
    made_of: Mapping[str, Any] | None = None,
    digests: dict[str, str] | None = None,
    model: str = "",
) -> Generator[str, None, FoldedCheckpoint]:
    """The steps of `fold_checkpoint`: gives each shard's name before it is written.

    Args:
        expected: hashes of the base's tensors, which the source's must have.
        where: what has them, for errors.
        digests: of the source's tensors, as far as they are known; more are added.
        model: what the base is called, see `Base`.
    """
    require_unchanged(program)
    if cut := program.reshaped():
        raise FoldError(
            f"{cut[0]} has another shape than in the checkpoint, so nothing can be folded into its "
            "files. Save the folded program itself: peftfx.save_program."
        )
    made_of = made_of or {"base": files_of(checkpoint), "adapters": _adapters(program)}
    if (record := finished(target, RECORD, made_of)) is not None:
        return said_again(target, record)
    stored = program.base.base_tensors()
    values = {n: t for n, t in stored.items() if not t.is_meta}
    base = Base(where, model, values, expected, {} if digests is None else digests)
    return (yield from writing(ShardFolder(program, checkpoint), target, made_of, base))


@dataclass
class Base:
    """What a checkpoint has to hold for adapters to be folded into it.

    Attributes:
        where: what says so, for errors.
        model: what the base is called, by default as its checkpoint's folder.
        values: tensors of the base, by first name, as far as they are at hand.
        expected: hashes of the base's tensors, None where nobody knows them.
        digests: of the checkpoint's tensors, as far as they are known; more are added.
    """

    where: str
    model: str = ""
    values: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    expected: Mapping[str, str] | None = None
    digests: dict[str, str] = field(default_factory=dict[str, str])


def writing(
    folder: Folder, target: str | Path, made_of: Mapping[str, Any], base: Base
) -> Generator[str, None, FoldedCheckpoint]:
    """Writes a checkpoint with its tensors' new values; gives each shard's name before."""
    result, checkpoint = FoldedCheckpoint(Path(target)), folder.checkpoint
    writer = _Writer(folder, base)
    with job(target, RECORD, made_of, lambda _: result.record()) as mine:
        for file in checkpoint.shards:
            if file not in mine.done:
                yield file
                writer.write(file, mine)
            else:
                folder.resume(checkpoint.shards[file])
                result.resumed.append(file)
            result.take(mine.done[file])
        folder.finish()
        _copy_others(checkpoint, mine.folder, result)
        result.beside = folder.leave(mine.folder / BESIDE)
        (mine.folder / CARD).write_text(_card(folder, result, base), encoding="utf-8")
    warn_of(result.notes)
    return result


def said_again(target: str | Path, record: Mapping[str, Any]) -> FoldedCheckpoint:
    """The result of a fold that was finished before."""
    result = FoldedCheckpoint(Path(target), nothing_to_do=True)
    result.copied, result.left_out = record["copied"], record["left_out"]
    result.beside = record.get("beside", [])
    result.take(record)
    return result


def files_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a checkpoint's files from others without reading their tensors: names, sizes and
    times of the last change."""
    status = {f: (checkpoint.directory / f).stat() for f in checkpoint.shards}
    return {f: [s.st_size, s.st_mtime_ns] for f, s in status.items()}


def _adapters(program: Program) -> dict[str, Any]:
    """Recipe and hash of what a program has beside its base."""
    tensors = {n: t for name in program.owners for n, t in program.adapter_tensors(name).items()}
    root = merkle_root({n: "" if t.is_meta else tensor_digest(t) for n, t in tensors.items()})
    return {"recipe": [r.text for r in program.history], "tensors": root}


class _Writer:
    """Writes the shards of one fold."""

    def __init__(self, folder: Folder, base: Base) -> None:
        self.folder, self.checkpoint, self.base = folder, folder.checkpoint, base
        if base.expected is not None:
            names = {*folder.state_names}
            wanted = {n: d for n, d in base.expected.items() if n in names}
            have = {n: wanted.get(n, "") for n in folder.names}
            if have != wanted:
                raise BaseMismatchError(base_difference(have, wanted, base.where))

    def write(self, file: str, mine: Job) -> None:
        """Writes a shard, and notes what was measured of it."""
        folded, path = self.folder.result, self.checkpoint.directory / file
        before, notes, changed = {*folded.shares}, len(folded.vanished), len(self.folder.changed)
        with mine.file(file, path.stat().st_size) as (new, said), open(path, "rb") as old:
            new.write(old.read(header_size(path)))
            for name in self.checkpoint.shards[file]:
                self._tensor(name, new)
            fresh = {s: v for s, v in folded.shares.items() if s not in before}
            said["changed"] = self.folder.changed[changed:]
            said["shares"] = {s: (v.left, v.lost) for s, v in fresh.items()}
            said["lost"] = max((v.lost for v in fresh.values()), default=0.0)
            said["gap"] = max((v.gap for v in fresh.values()), default=0.0)
            said["notes"] = folded.vanished[notes:]

    def _tensor(self, name: str, new: BinaryIO) -> None:
        source = self.checkpoint.mapped(name)
        self._require_base(name, source)
        folded = self.folder.folded(name)
        write_tensor(new, source if folded is None else folded)
        if (end := new.tell()) != self.checkpoint.entries[name].end:
            raise VerifyError(f"{name} ends at byte {end} of its file, which its header denies.")

    def _require_base(self, name: str, source: Tensor) -> None:
        """Raises BaseMismatchError unless a tensor is that of the base that adapters are of."""
        canonical, same, base = self.folder.canonical(name), True, self.base
        if base.expected is not None:
            whole = self.checkpoint.whole(name)
            if whole not in base.digests:
                base.digests[whole] = tensor_digest(
                    source if whole == name else self.checkpoint.mapped(whole)
                )
            same = base.expected.get(canonical, base.digests[whole]) == base.digests[whole]
        elif (known := base.values.get(canonical)) is not None:
            same = self.checkpoint.holds(known, name)
            same = same or _same_bytes(self.checkpoint.piece(name, known), source)
        if not same:
            raise BaseMismatchError(
                f"{base.where} was trained on other base weights: {name!r} differs. Fold into the "
                "checkpoint that it was trained on."
            )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.cpu().contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def _card(folder: Folder, result: FoldedCheckpoint, base: Base) -> str:
    """What the folder says of itself, in the place of the base's own card."""
    checkpoint = folder.checkpoint
    model = base.model or checkpoint.directory.resolve().name
    kinds = [f"| {kind} | {count} |" for kind, count in sorted(folder.kinds().items())]
    left = sorted(share for share, _ in result.shares.values())
    count = f"{len(result.changed)} of {len(checkpoint.entries)} tensors"
    said = [
        f"{count} have {folder.called} folded in; all others are those of {model}, bit for bit.",
        "\n".join(["| folded | weights |", "|---|---|", *kinds]),
    ]
    if left:
        said.append(
            "Each weight was compared with what its branches compute (they differ by "
            f"{result.gap:.1g} at most, relatively). Rounding to the files' dtype left between "
            f"{left[0]:.1%} and {left[-1]:.1%} of each change along its direction, with errors of "
            f"at most {result.lost:.1%} of its size; `{RECORD}` has them by weight."
        )
    if result.beside:
        said.append(
            f"At {len(result.beside)} weights the adapter in `{BESIDE}/` has what was not folded: "
            "load it, too."
        )
    return whole_card(f"{model}, with {folder.called} folded in", [model], said)


def _copy_others(checkpoint: Checkpoint, fresh: Path, result: FoldedCheckpoint) -> None:
    """Configuration, tokenizer and so on; weights in other formats would be stale, and the card is
    the base's."""
    for path in sorted(checkpoint.directory.iterdir()):
        if path.name in (*checkpoint.shards, RECORD, CARD):
            continue
        if path.name != checkpoint.index and path.name.endswith(WEIGHT_FORMATS):
            result.left_out.append(path.name)
        elif path.is_dir():
            result.left_out.append(f"{path.name}/")
        else:
            _copy_file(path, fresh / path.name)
            result.copied.append(path.name)


def _copy_file(path: Path, target: Path) -> None:
    """A file as it is. A configuration that says its dense tensors were read from a GGUF file loses
    that entry: transformers would neither save, halve nor train the model."""
    if path.name == "config.json" and b'"gguf"' in (data := path.read_bytes()):
        config = parse_json(data, str(path))
        about = config.get("quantization_config") if isinstance(config, dict) else None
        if isinstance(about, dict) and about.get("quant_method") == "gguf":
            del config["quantization_config"]
            target.write_bytes(write_json(config))
            return
    shutil.copyfile(path, target)
