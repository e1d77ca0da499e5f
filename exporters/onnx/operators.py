"""Operators that `torch.onnx` has no translation for, written in ONNX operators.

A grouped product (the experts of transformers 5) becomes a loop over groups, each a product of a
slice of the rows: no more work than in torch, and the stack of matrices stays one tensor. Inverses
of matrices are an operator of ONNX Runtime's own. A random projection brings its numbers along, two
for each entry that it gives; a fold needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

import numpy as np
import onnx
import onnxscript
import torch
from onnxscript import ir, values
from onnxscript.onnx_types import DOUBLE, FLOAT, FLOAT16, INT32, INT64

from ...kernels.hadamard import digits, hadamard_matrix
from ...kernels.random_projection import dense_matrix, tables

op: Any = onnxscript.opset18

Floats = TypeVar("Floats", bound=Union[FLOAT, FLOAT16, DOUBLE])  # noqa: UP007
Ends = TypeVar("Ends", bound=Union[INT32, INT64])  # noqa: UP007


@onnxscript.script(values.Opset("peftfx", 1), default_opset=op)
def grouped_product(x: Floats, matrices: Floats, ends: Ends) -> Floats:  # pyright: ignore[reportInvalidTypeVarUse]
    """Rows `ends[i - 1]` to `ends[i]` of x times matrix i; zeros behind the last end.

    Args:
        x: `[rows, in]`.
        matrices: `[groups, in, out]`.
        ends: `[groups]`, rising.

    Returns:
        `[rows, out]`.
    """
    axis = op.Constant(value_ints=[0])
    last = op.Constant(value_ints=[-1])
    stops = op.Cast(ends, to=7)
    starts = op.Concat(axis, op.Slice(stops, axis, last), axis=0)
    groups = op.Squeeze(op.Shape(stops))
    zero = op.CastLike(op.Constant(value_float=0.0), x)
    columns = op.Shape(matrices, start=2, end=3)
    # An empty part, which has the dtype; an empty sequence would be one of float32.
    parts = op.SequenceConstruct(op.Expand(zero, op.Concat(axis, columns, axis=0)))
    for i in range(groups):
        start = op.Unsqueeze(op.Gather(starts, i), axis)
        stop = op.Unsqueeze(op.Gather(stops, i), axis)
        part = op.MatMul(op.Slice(x, start, stop, axis), op.Gather(matrices, i))
        parts = op.SequenceInsert(parts, part)
    behind = op.Sub(op.Shape(x, start=0, end=1), op.Gather(stops, last))
    rest = op.Expand(zero, op.Concat(behind, columns, axis=0))
    parts = op.SequenceInsert(parts, rest)
    return op.ConcatFromSequence(parts, axis=0)


def _grouped_mm(
    x: Any, matrices: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if offs is None or bias is not None or out_dtype is not None:
        raise NotImplementedError("only with offsets, without bias and out_dtype")
    if len(x.shape) != 2 or len(matrices.shape) != 3:
        raise NotImplementedError("only for rows [rows, in] and matrices [groups, in, out]")
    return grouped_product(x, matrices, offs)


def _inverse(matrices: Any, check_errors: bool = False) -> Any:
    """`[..., n, n]`; with a state, which is of no use without an error."""
    del check_errors
    schema = onnx.defs.OpSchema
    floats = ["tensor(float16)", "tensor(float)", "tensor(double)"]
    declared = schema(
        "Inverse", "com.microsoft", 1, inputs=[schema.FormalParameter("X", "T")],
        outputs=[schema.FormalParameter("Y", "T")], type_constraints=[("T", floats, "")],
    )  # fmt: skip
    inverse: Any = values.Op(values.Opset("com.microsoft", 1), "Inverse", declared)
    return inverse(matrices), op.Constant(value_int=0)


def _hadamard(x: Any) -> Any:
    return op.Reshape(_flat_transform(x, int(x.shape[-1])), op.Shape(x))


def _flat_transform(x: Any, size: int) -> Any:
    """`x H` of rows of this size, in any shape that has as many numbers."""
    done = 1
    for digit in digits(size):
        h = _constant(hadamard_matrix(digit), x)
        axes = [-1, digit] if done == 1 else [-1, digit, done]
        parts = op.Reshape(x, op.Constant(value_ints=axes))
        x = op.MatMul(parts, h) if done == 1 else op.MatMul(h, parts)
        done *= digit
    return op.Reshape(x, op.Constant(value_ints=[-1]))


def _random_projection(theta: Any, seed: int, index: int, size: int, dense: bool) -> Any:
    dimension = int(theta.shape[0])
    if dense:
        return op.MatMul(_constant(dense_matrix(seed, index, 0, size, dimension), theta), theta)
    signs, place, g = tables(seed, index, size, dimension)
    narrow = 1 << (dimension - 1).bit_length()
    pads = op.Constant(value_ints=[0, narrow - dimension])
    mixed = _flat_transform(op.Pad(op.Mul(theta, _constant(signs, theta)), pads), narrow)
    places = op.Constant(value=ir.tensor((place % narrow).numpy()))
    spread = op.Mul(op.Gather(mixed, places), _constant(g, theta))
    first, last = (op.Constant(value_ints=[n]) for n in (0, size))
    return op.Slice(_flat_transform(spread, place.shape[1]), first, last)


def _constant(values_of: torch.Tensor, like: Any) -> Any:
    dtype = np.float32 if like.dtype is None else like.dtype.numpy()
    numbers = values_of.numpy().astype(dtype)
    return op.Constant(value=ir.tensor(numbers))


def operators() -> Mapping[Any, Callable[..., Any]]:
    """A table for `torch.onnx.export(custom_translation_table=...)`, of the operators that this
    process knows."""
    names = {
        "aten": "_grouped_mm", "transformers": "grouped_mm_fallback", "peftfx": "grouped_product",
    }  # fmt: skip
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.linalg_inv_ex.default: _inverse,
        torch.ops.peftfx.hadamard.default: _hadamard,
        torch.ops.peftfx.random_projection.default: _random_projection,
    }
    for space, name in names.items():
        operator = getattr(getattr(torch.ops, space), name, None)
        if operator is not None:
            table[operator.default] = _grouped_mm
    return table
