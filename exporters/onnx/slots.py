"""The factors of a LoRA adapter as inputs of an ONNX model, for `.onnx_adapter` files.

Each pair has a rank of its own, by a size of its own (with one for all, ONNX Runtime 1.32 shares
buffers of unequal ranks and fails). What is not fed is a default of rank 0: the model alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...passes.interchange.imported import Imported
from ...rewriter.api import Program
from ...rewriter.errors import ArtifactError, ExportError
from ...rewriter.parts.parts import LowRank
from ...rewriter.program.sites import WeightSite
from ...rewriter.run.run import run
from ..adapter_parts import adapter_parts, weight_name
from .adapter import A, B, slots
from .parity import require


@dataclass(frozen=True)
class Slots:
    """A program whose factors are to be inputs.

    Attributes:
        program: with all scales in the factors.
        bare: without the adapter.
        inputs: parameter -> name of the input.
        values: name of the input -> its tensor, `[in, rank]` or `[rank, out]`.
    """

    program: Program
    bare: Program
    inputs: Mapping[str, str]
    values: Mapping[str, Tensor]


def slotted(program: Program, adapter: str = "") -> Slots:
    """A program with an adapter whose factors can be inputs.

    Args:
        program: in float32.
        adapter: its name; the only one by default.

    Raises:
        ExportError: it is more than factors beside whole products, or in half precision.
    """
    if any(p.dtype != torch.float32 for p in program.module.parameters() if p.is_floating_point()):
        raise ExportError(
            "inputs for adapters are made in float32, and this program has other parameters. "
            "Capture the model in float32."
        )
    try:
        parts = adapter_parts(program, adapter)
        values = {name: t for part in parts.parts for name, t in slots(part).items()}
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    _require_whole(program, parts.source)
    bare = program.without(parts.source)
    scaled = tuple(
        replace(p, b=p.b * p.scale, scale=1.0, dropout=0.0)
        for p in parts.parts
        if isinstance(p, LowRank)
    )
    full = run(bare, Imported(name=parts.source), sources=[replace(parts, parts=scaled)])
    return Slots(full, bare, _inputs(full, parts.source), values)


def _require_whole(program: Program, adapter: str) -> None:
    for attachment in program.attachments:
        site = program.sites[attachment.site]
        if attachment.adapter == adapter and isinstance(site, WeightSite) and site.features:
            raise ExportError(
                f"{attachment.site}: the adapter is on some features of a fused weight, for which "
                "no adapter file has a name. Adapt all of the weight, or export it folded."
            )


def _inputs(program: Program, adapter: str) -> dict[str, str]:
    """Parameter -> name of its input."""
    inputs: dict[str, str] = {}
    for attachment in (a for a in program.attachments if a.adapter == adapter):
        branch: Any = program.branch(attachment)
        part, site = branch.part(), cast(WeightSite, program.sites[attachment.site])
        module = weight_name(program, site).removesuffix(".weight")
        for leaf, tensor in ((A, part.a), (B, part.b)):
            own = _name(branch, tensor)
            inputs[f"{attachment.path}.{own}"] = f"{module}.{leaf}"
    return inputs


def _name(branch: nn.Module, tensor: Tensor) -> str:
    """The parameter of which a tensor is the value."""
    where = tensor.data_ptr()
    return next(n for n, p in branch.named_parameters() if p.data_ptr() == where)


def as_inputs(
    model: Any, inputs: Mapping[str, str], transposed: tuple[str, ...]
) -> tuple[str, ...]:
    """Makes stored tensors of a graph (`onnx_ir.Model`) inputs with a default of rank 0.

    Args:
        model: changed in place.
        inputs: name of the stored tensor -> of the input.
        transposed: what is stored with its axes permuted.

    Returns:
        What is still stored so.

    Raises:
        ExportError: the graph reads one in another way than as a factor.
    """
    ranks: dict[str, str] = {}
    for name, slot in inputs.items():
        value = model.graph.initializers.get(name)
        if value is None or name not in transposed:
            raise ExportError(f"{name}: the graph has no product with it. Export it folded.")
        module, first = slot[: -len(A) - 1], slot.endswith(A)
        rank = ranks.setdefault(module, f"rank_{len(ranks)}")
        if first:
            _forget_shapes(value, model.graph.initializers[_partner(inputs, f"{module}.{B}")])
        del model.graph.initializers[name]
        _open(model.graph, value, slot, rank, first)
    from .weights import TRANSPOSED  # needs onnx

    left = tuple(n for n in transposed if n not in inputs)
    model.metadata_props[TRANSPOSED] = json.dumps(left)
    return left


def _partner(inputs: Mapping[str, str], slot: str) -> str:
    return next(n for n, s in inputs.items() if s == slot)


def _open(graph: Any, value: Any, slot: str, rank: str, first: bool) -> None:
    ir: Any = require("onnx_ir")
    np: Any = require("numpy")
    rows, columns = (int(s) for s in value.shape)
    shape = (rows, 0) if first else (0, columns)
    value.name = slot
    value.const_value = ir.tensor(np.zeros(shape, np.float32), name=slot)
    value.shape = ir.Shape([rows, rank] if first else [rank, columns])
    graph.register_initializer(value)
    graph.inputs.append(value)


def _forget_shapes(first: Any, second: Any) -> None:
    """Drops the shapes of what is computed between two factors: they have the rank."""
    waiting = [first]
    while waiting:
        for node, _ in list(waiting.pop().uses()):
            if second in node.inputs:
                continue
            for output in node.outputs:
                output.shape = None
                waiting.append(output)
