"""One operator for a linear whose weight trains at some places only: `linear(x, W', b)`.

    W' = W + (values at the flat `indices`)               axis None
    W' = W + (values at the rows or columns `indices`)    axis 0 or 1

Backward saves x (for columns only what those read of it), not W', which is made anew, and never
forms a gradient of W's size:

    dx = dy W',   dvalues[n] = sum_t dy[t, i_n] x[t, j_n]     rows: dy[:, i]^T x
                                                              columns: dy^T x[:, j]

The sums over chosen entries are a sampled product of dense matrices: of 0.5 % of a matrix of
384 x 1536 it takes a third of the dense gradient's time on a CPU. Devices and dtypes without it
take the entries of the dense gradient. Split of rows: FAR, Vucetic et al., ISCAS 2022.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor,
    axis: int | None,
) -> Tensor:  # fmt: skip
    """The formula, with the gradients that autograd makes of it."""
    return F.linear(x, _changed(weight, values, indices, axis), bias)


def partial_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor,
    axis: int | None,
) -> Tensor:  # fmt: skip
    """`linear(x, W', bias)`, differentiable in every floating tensor.

    Args:
        x: `[..., K]`; weight: `[N, K]`; bias: `[N]` or None.
        values: `[n]`, `[n, K]` or `[N, n]`, for `axis` None, 0 or 1; also wider than weight.
        indices: `[n]`, distinct; flat ones into weight, or along the axis.
        axis: see above.

    Returns:
        `[..., N]`.
    """
    usual = type(x) is Tensor or isinstance(x, FakeTensor)
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if cast or not usual or torch.compiler.is_compiling():
        return reference(x, weight, bias, values, indices, axis)
    return _Partial.apply(x, weight, bias, values, indices, axis)


def _changed(weight: Tensor, values: Tensor, indices: Tensor, axis: int | None) -> Tensor:
    """W'."""
    values = values.to(weight.dtype)
    if axis is not None:
        return weight.index_add(axis, indices, values)
    return weight.flatten().scatter_add(0, indices.long(), values).view(weight.shape)


class _Partial(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor,
        axis: int | None,
    ) -> Tensor:  # fmt: skip
        whole = axis != 1 or ctx.needs_input_grad[1]
        read = x if whole else x.index_select(-1, indices)
        ctx.save_for_backward(read if ctx.needs_input_grad[3] else None, weight, values, indices)
        ctx.axis, ctx.whole = axis, whole
        return F.linear(x, _changed(weight, values, indices, axis), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        read, weight, values, indices = ctx.saved_tensors
        need_x, need_weight, need_bias, need_values = ctx.needs_input_grad[:4]
        down = dy.reshape(-1, dy.shape[-1])
        dx = dy @ _changed(weight, values, indices, ctx.axis) if need_x else None
        dvalues = dweight = None
        if need_values:
            rows = read.reshape(-1, read.shape[-1])
            chosen = rows.index_select(1, indices) if ctx.whole and ctx.axis == 1 else rows
            dvalues = _gradient(down, chosen, indices, ctx.axis).to(values.dtype)
            dweight = down.t() @ rows if need_weight else None
        return dx, dweight, down.sum(0) if need_bias else None, dvalues, None, None


def _gradient(down: Tensor, rows: Tensor, indices: Tensor, axis: int | None) -> Tensor:
    """Of the values; `rows` of columns holds just those."""
    if axis == 0:
        return down.index_select(1, indices).t() @ rows
    if axis == 1:
        return down.t() @ rows
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return (down.t() @ rows).flatten()[indices.long()]
    _warned()
    ascending = bool((indices[1:] > indices[:-1]).all())
    order = None if ascending else indices.argsort()
    index = (indices if order is None else indices[order]).long()
    shape = down.shape[1], rows.shape[1]
    starts = torch.bincount(index // shape[1], minlength=shape[0]).cumsum(0)
    places = torch.sparse_csr_tensor(
        F.pad(starts, (1, 0)), index % shape[1], rows.new_zeros(len(index)), shape,
        check_invariants=False,
    )  # fmt: skip
    found = torch.sparse.sampled_addmm(places, down.t(), rows, beta=0.0).values()
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


@functools.cache
def _warned() -> None:
    """torch says once a process that its compressed sparse tensors may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.zeros(0, dtype=torch.long), torch.zeros(0), (1, 1))
