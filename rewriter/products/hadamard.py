"""Products, entry by entry, of two low-rank matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Product(torch.autograd.Function):
    """Keeps the factors alone, and multiplies them again in backward."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        one, two = grads[0] * (a2 @ b2), grads[0] * (a1 @ b1)
        return one @ b1.mT, a1.mT @ one, two @ b2.mT, a2.mT @ two


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """`(a1 b1) o (a2 b2)`: `[..., out, rank]`, `[..., rank, in]` to `[..., out, in]`."""
    product: Any = _Product.apply(a1, b1, a2, b2)
    return product


def pairs(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """`(b [..., rank^2, in], a [..., out, rank^2])` with `a b` the same, row by row (Khatri and
    Rao's product)."""
    b = (b1[..., :, None, :] * b2[..., None, :, :]).flatten(-3, -2)
    return b, (a1[..., :, None] * a2[..., None, :]).flatten(-2)
