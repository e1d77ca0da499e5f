"""Weights in and out, tensor by tensor: programs for models that no memory holds twice.

`load_weights` gives a program that was captured on the meta device its weights, mapped from
their files. `fold_checkpoint` writes a checkpoint with adapters folded in, shard by shard: it
holds one weight at a time and uses the fold rules of `fold.py`, the same bytes as in memory.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..api import Program
from ..edits.folding.result import warn_of
from ..errors import BaseMismatchError, FoldError, MetaTensorError
from ..files.directory import new_directory
from ..files.files import parse_json, write_json
from ..files.identity import tensor_bytes, tensor_digest, tensor_prefix
from ..graph.aten import set_attribute
from ..graph.module import copy_modes, device_of, outside_inference
from ..graph.placement import relocate, still_hollow
from ..program.fingerprint import Fingerprints
from ..program.history import ITSELF
from ..program.trained import train_only
from ..program.unchanged import require_unchanged
from ..run.before_fold import values_then
from ..run.replay import load_values
from ..run.run import apply_plan
from .artifact import base_difference, read
from .folding import ShardFolder
from .loading import attach
from .safetensors_checkpoint import Checkpoint, Entry, header_size

WEIGHT_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf",
                  ".onnx", ".npz", ".index.json")  # fmt: skip
"""Files that hold weights: not copied beside folded ones, which would contradict them."""


@outside_inference
def load_weights(
    program: Program,
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    strict: bool = True,
    buffers: Mapping[str, Tensor] | None = None,
) -> Program:
    """Gives a captured program the weights of a Hugging Face style checkpoint, tensor by tensor.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        program = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": mask})
        program = peftfx.load_weights(program, "model/")

    On the CPU, weights stay in their files until they are read (memory mapping), so the model may
    be larger than memory; do not change the files meanwhile. They are frozen, as adapters want
    them. Adapters that the program has are inserted again by its plans (an adapter that has
    values keeps them), and their contracts, unmeasured so far, are measured.

    Args:
        program: usually captured on the meta device; it is not changed.
        directory: `model.safetensors`, or shards with their `*.safetensors.index.json`.
        device: where the weights go.
        strict: refuse tensors in the files that the program has no place for.
        buffers: values of buffers that no checkpoint holds, for models whose classes do not
            keep what is needed to compute them again.

    Raises:
        ArtifactError: there is no checkpoint (CorruptFileError: it is damaged; WeightsError:
            its tensors do not fit).
        MetaTensorError: buffers whose values are not known; pass `buffers`.
    """
    checkpoint = Checkpoint.read(directory)
    names = checkpoint.match(program, strict)
    place = torch.device(device)
    base = _filled(program, checkpoint, names, place, buffers or {})
    mine = program.owned.get(ITSELF, ())
    if mine:
        base = base.fork()  # the base stays as the checkpoint has it
        train_only(base, mine)
    copy_modes(program.module, base.module)
    return _adapted(program, base, place)


def _filled(
    program: Program, checkpoint: Checkpoint, names: Mapping[str, str], place: torch.device,
    buffers: Mapping[str, Tensor],
) -> Program:  # fmt: skip
    """The program's base with a checkpoint's values, frozen, in the dtypes of the files."""
    base = program.base.fork()
    gm = base.module
    relocate(gm, device_of(gm), place)
    extras = dict(base.extras)
    parameters = {n for n, _ in gm.named_parameters()}
    own = parameters | {n for n, _ in gm.named_buffers()}
    with torch.no_grad():
        for canonical, name in names.items():
            tensor = checkpoint.mapped(name).to(place)
            if canonical in parameters:
                set_attribute(gm, canonical, nn.Parameter(tensor, requires_grad=False))
            elif canonical in own:
                set_attribute(gm, canonical, tensor.clone())
            if canonical in extras:
                extras[canonical] = tensor
        for name, buffer in list(gm.named_buffers()):
            value = buffers.get(name, buffer)
            if not value.is_meta:
                set_attribute(gm, name, value.to(place, buffer.dtype))
    _require_values(still_hollow(gm, extras))
    sample = {n: _real(program, n, t).to(place) for n, t in base.sample.items()}
    filled = replace(base, origin=None, extras=extras, sample=sample, prints=Fingerprints())
    filled.prints = filled.fingerprints(values=False)
    return filled


def _require_values(hollow: Sequence[str]) -> None:
    if not hollow:
        return
    raise MetaTensorError(
        f"{', '.join(hollow[:4])}: no checkpoint holds these buffers, and the model's class "
        "does not keep what is needed to compute them. Pass load_weights(..., buffers={name: "
        "tensor}), for example dict(small_model.named_buffers()) of a small real model."
    )


def _adapted(program: Program, base: Program, place: torch.device) -> Program:
    """`base` with the adapters of `program`, by its plans; those that have values keep them."""
    current = base
    for index, record in enumerate(program.history):
        current = apply_plan(current, record.applied, record.plan)
        later = program.history[index + 1 :]
        reshaped = any(r.applied.reshapes for r in later)
        for adapter in current.owners:
            values = values_then(program.adapter_tensors(adapter), [r.plan for r in later])
            here = {n: t.to(place) for n, t in values.items() if not t.is_meta}
            load_values(current, here, reshaped)
    return current


def _real(program: Program, name: str, sample: Tensor) -> Tensor:
    if not sample.is_meta:
        return sample
    fill = next(i.fill for i in program.base.spec.inputs if i.name == name)
    if sample.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(sample.shape, generator=generator).to(sample.dtype)
    return torch.full(sample.shape, fill, dtype=sample.dtype)


@dataclass
class FoldedCheckpoint:
    """What `fold_checkpoint` wrote.

    Attributes:
        directory: the new checkpoint.
        changed: names of the tensors that folding wrote; all others are the source's bytes.
        copied, left_out: other files of the source; left out are weights in other formats.
        lost: largest share of a delta that rounding lost.
        gap: largest relative difference between a branch and what the files say that it added.
        notes: (site, what to know about it): where rounding left nothing of what was learnt.
    """

    directory: Path
    changed: list[str] = field(default_factory=list[str])
    copied: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    lost: float = 0.0
    gap: float = 0.0
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def fold_checkpoint(
    program: Program,
    source: str | Path,
    target: str | Path,
    *,
    adapter: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> FoldedCheckpoint:
    """Folds adapters into a checkpoint directory, writing a new one with the same layout.

    Args:
        program: the captured model (the meta device is enough), with its adapters in it unless
            `adapter` is given; it is not changed.
        source: the base model's checkpoint directory; it is only read.
        target: a new or empty directory. It appears complete, by rename, or not at all.
        adapter: what `save` wrote; the source's hashes are checked against it.
        progress: called with the name of each shard before it is written.

    Raises:
        FoldError: something cannot be folded into the checkpoint's tensors, because it is not
            linear or because something else in the model reads them, or channels were cut.
        VerifyError: what was written is not what the branches compute (an error in a fold rule).
        BaseChangedError: the program's own base was changed since it was captured.
        BaseMismatchError: the adapter was trained on other weights than the source's.
        ArtifactError: source or adapter are damaged or do not fit, or the target cannot be
            written (CorruptFileError, WeightsError). In every case the target stays absent.
    """
    require_unchanged(program)
    checkpoint = Checkpoint.read(source)
    expected: Mapping[str, str] | None = None
    if adapter is not None:
        artifact = read(adapter)
        expected = artifact.base
        program = attach(program, artifact, str(adapter))
    elif not any(t.is_meta for t in program.base.base_tensors().values()):
        expected = {n: tensor_digest(t) for n, t in program.base.base_tensors().items()}
    if cut := program.reshaped():
        raise FoldError(
            f"{cut[0]} has another shape than in the checkpoint, so nothing can be folded into its "
            "files. Save the folded program itself: peftfx.save_program."
        )
    where = str(adapter or "the program")
    folder = ShardFolder(program, checkpoint)
    keys: dict[str, str] = {}
    result = FoldedCheckpoint(Path(target))
    with new_directory(target, None) as fresh:
        _copy_others(checkpoint, fresh, result)
        for file, names in checkpoint.shards.items():
            if progress is not None:
                progress(file)
            with open(checkpoint.directory / file, "rb") as old, open(fresh / file, "wb") as new:
                new.write(old.read(header_size(checkpoint.directory / file)))
                for name in names:
                    canonical = folder.canonical(name)
                    digest = _copy(checkpoint, name, old, folder.folded(name), new)
                    if keys.setdefault(canonical, digest) != digest:
                        raise BaseMismatchError(f"{source} holds two tensors for {canonical!r}.")
                    if expected is not None and expected.get(canonical) != digest:
                        raise BaseMismatchError(
                            f"{where} was trained on other base weights: {name!r} differs. Fold "
                            "into the checkpoint that it was trained on."
                        )
        folder.finish()
        want = {n: d for n, d in (expected or keys).items() if n in program.base.state_names}
        if keys != want:
            raise BaseMismatchError(base_difference(keys, want, where))
        result.gap = folder.read_back(fresh)
    result.changed, result.lost = folder.changed, folder.result.lost
    result.notes = folder.result.vanished
    warn_of(result.notes)
    return result


def _copy(
    checkpoint: Checkpoint, name: str, old: BinaryIO, folded: Tensor | None, new: BinaryIO
) -> str:
    """Writes one tensor, folded or as it is; returns the digest of what it was."""
    entry: Entry = checkpoint.entries[name]
    digest = hashlib.sha256(tensor_prefix(entry.dtype, entry.shape))
    for piece in checkpoint.chunks(name, old):
        digest.update(piece)
        if folded is None:
            new.write(piece)
    if folded is not None:
        if tuple(folded.shape) != entry.shape:
            raise FoldError(
                f"{name}: the folded tensor is {tuple(folded.shape)}, but the checkpoint's is "
                f"{entry.shape}."
            )
        new.write(tensor_bytes(folded.to(entry.dtype)))  # what trained may be wider
    return digest.hexdigest()


def _copy_others(checkpoint: Checkpoint, fresh: Path, result: FoldedCheckpoint) -> None:
    """Configuration, tokenizer and so on; weights in other formats would be stale."""
    for path in sorted(checkpoint.directory.iterdir()):
        if path.name in checkpoint.shards:
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
