"""Rows of a linear's outputs times one number each, in place, differentiable from the results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_rows(own: Tensor, c: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    """`own * c + bias` with `own [..., out]`, c and bias `[out]`.

    With `in_place`, in float32 and wider the result takes the place of own, and is what is kept for
    the gradient of c, since what reads it often keeps it, too: `(y - bias) / c` is own. Where some
    c is zero, on GPUs (which would have to wait for that) and in fewer bits, own is kept.
    """
    plain = torch.compiler.is_compiling() or own.is_cuda or own.is_meta or type(own) is not Tensor
    narrow = own.dtype.itemsize < 4 or own.dtype != c.dtype
    useless = not in_place or not torch.is_grad_enabled() or not own.requires_grad
    if plain or narrow or useless or not c.all():
        scaled = own * c if bias is None else torch.addcmul(bias, own, c)
        return scaled.to(own.dtype)
    results: Any = _InPlace.apply(own, c, bias)
    return results


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        y = own.mul_(c) if bias is None else own.mul_(c).add_(bias)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y, c, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        y, c, bias = ctx.saved_tensors
        (dy,) = grads
        need_own, need_c, need_bias = ctx.needs_input_grad
        rows, results = dy.flatten(0, -2), y.flatten(0, -2)
        total = rows.sum(0) if bias is not None and (need_c or need_bias) else None
        dc = (rows * results).sum(0) if need_c else None
        if dc is not None and bias is not None and total is not None:
            dc = dc - bias * total
        return (
            dy * c if need_own else None,
            None if dc is None else dc / c,
            total if need_bias else None,
        )
