"""Weights in, tensor by tensor: values for programs that were captured on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..api import Program
from ..errors import MetaTensorError
from ..graph.aten import set_attribute
from ..graph.module import copy_modes, device_of
from ..graph.outside import outside_modes
from ..graph.placement import relocate, still_hollow
from ..program.fingerprint import Fingerprints
from ..program.history import ITSELF
from ..program.trained import train_only
from ..run.before_fold import values_then
from ..run.replay import load_values
from ..run.run import apply_plan
from .safetensors_checkpoint import Checkpoint


@outside_modes
def load_weights(
    program: Program,
    directory: str | Path | Checkpoint,
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
        directory: `model.safetensors`, or shards with their `*.safetensors.index.json`. Where
            files have other tensors than the model, see `checkpoint_of`.
        device: where the weights go.
        strict: refuse tensors in the files that the program has no place for.
        buffers: values of buffers that no checkpoint holds, for models whose classes do not
            keep what is needed to compute them again.

    Raises:
        ArtifactError: there is no checkpoint (CorruptFileError: it is damaged; WeightsError:
            its tensors do not fit).
        MetaTensorError: buffers whose values are not known; pass `buffers`.
    """
    files = isinstance(directory, Checkpoint)
    checkpoint = directory if files else Checkpoint.read(directory)
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
