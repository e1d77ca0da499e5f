"""Rows by group times a matrix a group, in any dtype: `peftfx::grouped_product`.

    y[i] = x[i] W[g],   ends[g - 1] <= i < ends[g];   y[i] = 0 behind the last end

One product a group that has rows, as much work as the rows need; no size depends on how many each
group has, so a graph holds it whatever `ends` says. torch's own is traced in bfloat16 only.

    dx[i] = dy[i] W[g]^T,   dW[g] = sum_{i in g} x[i]^T dy[i]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, library

_LIBRARY = library.Library("peftfx", "FRAGMENT")
_LIBRARY.define("grouped_product(Tensor x, Tensor matrices, Tensor ends) -> Tensor")
_LIBRARY.define(
    "grouped_product_backward(Tensor dy, Tensor x, Tensor matrices, Tensor ends, bool[] needs)"
    " -> Tensor[]"
)


def reference(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The formula: every row times all matrices, of which its own is taken."""
    row = torch.arange(x.shape[0], device=x.device)
    group = (row[:, None] >= ends).sum(-1)
    products = torch.einsum("ri,gio->rgo", x, matrices)
    own = products[row, group.clamp(max=len(matrices) - 1)]
    return torch.where((group < len(matrices))[:, None], own, 0.0)


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Differentiable in x and matrices.

    Args:
        x: `[rows, in]`, any floating dtype, which is that of the result.
        matrices: `[groups, in, out]`, of the same dtype.
        ends: `[groups]`, int32 or int64, not falling.

    Returns:
        `[rows, out]`.
    """
    return torch.ops.peftfx.grouped_product(x, matrices, ends)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = max(start, end)


def _forward(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], matrices.shape[2]))
    for group, rows in _groups(ends):
        torch.mm(x[rows], matrices[group], out=y[rows])
    return y


def _gradients(
    dy: Tensor, x: Tensor, matrices: Tensor, ends: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    dx, dw = _empty(x, needs[0]).zero_(), _empty(matrices, needs[1]).zero_()
    for group, rows in _groups(ends):
        if needs[0]:
            torch.mm(dy[rows], matrices[group].t(), out=dx[rows])
        if needs[1]:
            torch.mm(x[rows].t(), dy[rows], out=dw[group])
    return [dx, dw]


def _empty(like: Tensor, needed: bool) -> Tensor:
    return like.new_empty(like.shape if needed else (0,))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    pulled = torch.ops.peftfx.grouped_product_backward(dy, *ctx.saved_tensors, needs)
    return (*(g if n else None for g, n in zip(pulled, needs, strict=True)), None)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("grouped_product", _forward, _key)
    _LIBRARY.impl("grouped_product_backward", _gradients, _key)
library.register_fake(
    "peftfx::grouped_product",
    lambda x, matrices, ends: x.new_empty((x.shape[0], matrices.shape[2])),
    lib=_LIBRARY,
)
library.register_fake(
    "peftfx::grouped_product_backward",
    lambda dy, x, matrices, ends, needs: [_empty(x, needs[0]), _empty(matrices, needs[1])],
    lib=_LIBRARY,
)
library.register_autograd("peftfx::grouped_product", _backward, setup_context=_setup, lib=_LIBRARY)

OPERATOR = torch.ops.peftfx.grouped_product.default
"""The operator itself, for graphs."""
