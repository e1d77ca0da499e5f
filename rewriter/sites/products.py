"""Products with stored matrices: what of a matrix a call multiplies by, and which calls read one in
a way that no branch can stand beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.aten import (
    CASTS,
    LINEAR,
    MATMULS,
    attribute,
    is_op,
    overloads,
    parameter_of,
)  # fmt: skip

PRODUCTS = MATMULS | {LINEAR} | overloads(
    "addmm", "addbmm", "mv", "addmv", "dot", "inner", "tensordot", "einsum", "bilinear",
    "chain_matmul", "linalg_multi_dot", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell",
    "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
)  # fmt: skip
"""Operators that multiply matrices."""

_STILL = CASTS | overloads(
    "contiguous", "clone", "lift_fresh_copy", "expand", "expand_as", "broadcast_to"
)  # fmt: skip
"""Steps that change no entry's place among the last axes."""


@dataclass(frozen=True)
class Matrix:
    """A stored matrix, or a stack of them, as a call reads it.

    Attributes:
        path: the parameter's name.
        held: the parameter.
        turned: it is read transposed.
        rows: the rows that are read, None for all.
        place: the axis along which the matrices of a stack lie.
    """

    path: str
    held: Tensor
    turned: bool = False
    rows: tuple[int, ...] | None = None
    place: int = 0

    @property
    def sizes(self) -> tuple[int, int]:
        """Of one matrix, as it is stored."""
        shape = list(self.held.shape)
        if len(shape) == 3:
            del shape[self.place]
        return shape[0], shape[1]


def matrix(gm: GraphModule, node: object) -> Matrix | None:
    """The stored matrix (or stack) that a value is, maybe transposed or some of its rows; None if
    it is no such value."""
    parameter = parameter_of(node)
    if parameter is None:
        return None
    path, steps = parameter
    tensor = attribute(gm, path)
    if not isinstance(tensor, nn.Parameter) or tensor.dim() not in (2, 3):
        return None
    layout = _strided(tuple(tensor.shape), steps)
    if layout is None:
        return None
    sizes, strides, start = layout
    while len(sizes) > tensor.dim() and sizes[0] == 1:
        sizes, strides = sizes[1:], strides[1:]
    if tensor.dim() == 3:
        return None if start else _stack(path, tensor, (sizes, strides))
    height, width = tensor.shape
    if len(sizes) != 2:
        return None
    for turned in (False, True):
        count, across = reversed(sizes) if turned else sizes
        step, along = reversed(strides) if turned else strides
        if across != width or along != 1 or start % width or (step % width and count > 1):
            continue
        first, every = start // width, step // width if count > 1 else 1
        rows = tuple(range(first, first + count * every, every))
        return Matrix(path, tensor, turned, None if rows == tuple(range(height)) else rows)
    return None


def _stack(path: str, tensor: Tensor, layout: tuple[Any, Any]) -> Matrix | None:
    """A stack of matrices that a view of a whole tensor is: which axis counts them, and whether
    they are turned."""
    size, step = tuple(tensor.shape), torch.empty(tensor.shape, device="meta").stride()
    for place in range(3):
        rest = [k for k in range(3) if k != place]
        for order in (rest, rest[::-1]):
            axes = (place, *order)
            if layout == (tuple(size[k] for k in axes), tuple(step[k] for k in axes)):
                return Matrix(path, tensor, order != rest, place=place)
    return None


def _strided(
    size: tuple[int, ...], steps: Sequence[Node]
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """(sizes, strides, offset) of what views leave of a contiguous tensor of `size`; None if they
    copy or depend on a size of the input."""
    base = view = torch.empty(size, device="meta")
    for step in steps:
        if is_op(step, _STILL):
            continue
        if len(step.all_input_nodes) > 1:
            return None
        target: Any = step.target
        try:
            view = target(view, *step.args[1:], **step.kwargs)
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            return None
    if not isinstance(view, Tensor):
        return None
    if view.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return None  # a copy
    return tuple(view.shape), tuple(view.stride()), int(view.storage_offset())


@dataclass(frozen=True)
class Reading:
    """A product with a stored matrix beside which no branch can stand, and why."""

    node: Node
    weight: str
    reason: str
