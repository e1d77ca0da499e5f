"""Programs in half precision: how far they may differ in ONNX Runtime, and as what to export them.

ONNX Runtime's CPU kernels compute float16 in float32 between the roundings of torch, and have next
to nothing for bfloat16. So a tolerance is measured on the program itself, and a bfloat16 program
is exported in another dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ...rewriter.api import Program
from ...rewriter.errors import ExportError, NonFiniteError
from ...rewriter.graph.aten import is_op, named_arguments, overloads, value

HALF = (torch.float16, torch.bfloat16)

TARGETS = (torch.float32, torch.float16)
"""What a program in half precision can be exported as."""

TOLERANCE = 1e-5
"""Difference allowed where nothing is computed in half precision, of the largest output."""

ROUNDINGS = 4
"""Of the program's own rounding error: twice for two ways to round, and as much again."""


def floor_of(dtypes: Iterable[torch.dtype]) -> float:
    """The difference allowed in any case: a few roundings of the coarsest dtype."""
    coarse = [torch.finfo(d).eps for d in dtypes if d in HALF]
    return 2 * max(coarse) if coarse else TOLERANCE


def dtypes_of(program: Program) -> set[torch.dtype]:
    """The floating-point dtypes that a program stores or computes in."""
    stored = [*program.module.parameters(), *program.module.buffers()]
    values = [value(n) for n in program.module.graph.nodes]
    tensors = [t for t in (*stored, *values) if isinstance(t, Tensor)]
    return {t.dtype for t in tensors if t.is_floating_point()}


def check_target(dtypes: set[torch.dtype], dtype: torch.dtype | None) -> None:
    """Refuses what no file could be written or verified for.

    Args:
        dtypes: what the program stores or computes in.
        dtype: what it is to be exported as; None: as it is.

    Raises:
        ExportError: bfloat16, or a dtype that a conversion of half precision does not lead to.
    """
    if dtype is None and torch.bfloat16 in dtypes:
        raise ExportError(
            "the program computes in bfloat16, for which ONNX Runtime's CPU kernels are missing, "
            "so no file could be verified. Export it in another dtype: dtype=torch.float32 or "
            "dtype=torch.float16 (--dtype)."
        )
    if dtype is None:
        return
    if dtype not in TARGETS:
        raise ExportError(f"dtype must be torch.float32 or torch.float16, not {dtype}.")
    if dtype not in dtypes and not dtypes & set(HALF):
        names = ", ".join(sorted(str(d) for d in dtypes)) or "no floating-point dtype"
        raise ExportError(
            f"only half precision is converted, and the program computes in {names}. Capture it "
            f"again: peftfx.capture(model, ..., dtype={dtype})."
        )


def in_dtype(program: Program, dtype: torch.dtype) -> Program:
    """A copy whose tensors, casts and inputs in half precision are in another dtype.

    Raises:
        NonFiniteError: a stored value is too large for it.
    """
    fork = program.fork()
    for path, module in fork.module.named_modules():
        _convert_stored(path, module, dtype)
        if isinstance(module, GraphModule):
            _convert_casts(module, dtype)
    inputs = tuple(replace(i, dtype=_new(i.dtype, dtype)) for i in fork.spec.inputs)
    sample = converted(fork.sample, dtype)
    return replace(fork, spec=replace(fork.spec, inputs=inputs), sample=sample)


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, those in half precision in another dtype."""
    return {n: t.to(_new(t.dtype, dtype)) for n, t in tensors.items()}


def _new(dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    return target if dtype in HALF else dtype


def _convert_stored(path: str, module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype in HALF:
            parameter.data = _fitting(f"{path}.{name}".lstrip("."), parameter.data, dtype)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in HALF:
            module._buffers[name] = _fitting(f"{path}.{name}".lstrip("."), buffer, dtype)


def _fitting(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; its own dtype's extremes, which masks hold, become that one's."""
    edge, far = torch.finfo(tensor.dtype).max, torch.finfo(dtype).max
    moved = tensor.to(dtype)
    for sign in (1, -1):
        moved = torch.where(tensor == sign * edge, moved.new_tensor(sign * far), moved)
    if not bool((torch.isfinite(moved) == torch.isfinite(tensor)).all()):
        raise NonFiniteError(f"{name} holds values that {dtype} cannot. Use dtype=torch.float32.")
    return moved


def _convert_casts(gm: GraphModule, dtype: torch.dtype) -> None:
    for node in gm.graph.nodes:
        half = isinstance(value(node), Tensor) and value(node).dtype in HALF

        def change(item: Any, half: bool = half) -> Any:
            if isinstance(item, torch.dtype):
                return _new(item, dtype)
            if half and isinstance(item, float) and math.isfinite(item):
                far = torch.finfo(dtype).max
                return max(-far, min(far, item))
            return item

        _change_arguments(node, change)
        _regroup(node)
    gm.recompile()


def _regroup(node: Node) -> None:
    """torch traces `_grouped_mm` in bfloat16 only; the operator with which transformers replaces
    it computes the same in any dtype."""
    any_dtype = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if any_dtype is not None and is_op(node, overloads("_grouped_mm")):
        given = named_arguments(node)
        if given.keys() == {"self", "mat2", "offs"}:
            node.target = any_dtype.default
            node.args, node.kwargs = (given["self"], given["mat2"], given["offs"]), {}


def _change_arguments(node: Node, change: Any) -> None:
    if node.op == "call_function":
        args: Any = map_aggregate(node.args, change)
        kwargs: Any = map_aggregate(node.kwargs, change)
        node.args, node.kwargs = args, kwargs
