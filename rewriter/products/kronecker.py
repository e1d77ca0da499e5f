"""Products with Kronecker products, which are never built."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kronecker(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`(a (x) b) x` of the last axis, in the order that multiplies less."""
    if x.dim() == 2:  # strides of merged rows do not part for all sizes alike
        x = x.clone(memory_format=torch.contiguous_format)
    x = x.unflatten(-1, (a.shape[1], b.shape[1]))
    a, b = a.to(x.dtype), b.to(x.dtype)
    first_b = b.numel() * a.shape[1] + a.numel() * b.shape[0]
    first_a = a.numel() * b.shape[1] + b.numel() * a.shape[0]
    y = F.linear(x.mT, a).mT if first_a < first_b else F.linear(x, b)  # one factor, then the other
    y = F.linear(y, b) if first_a < first_b else F.linear(y.mT, a).mT
    return y.flatten(-2)


def hypercomplex(x: Tensor, rule: Tensor, left: Tensor, right: Tensor | None = None) -> Tensor:
    """`x H` of the last axis, `H = sum_i A_i (x) B_i`, with `B_i = left_i right_i`, or left_i.

    The A_i act where the values between are narrowest, so that they cost least.

    Args:
        x: `[..., in]`.
        rule: A, `[n, n, n]`.
        left: `[n, in / n, rank]`, or B itself, `[n, in / n, out / n]`.
        right: `[n, rank, out / n]`.
    """
    if x.dim() == 2:
        x = x.clone(memory_format=torch.contiguous_format)
    x = x.unflatten(-1, (rule.shape[1], left.shape[1]))
    rule, left = rule.to(x.dtype), left.to(x.dtype)
    if right is None and left.shape[1] < left.shape[2]:
        y = torch.einsum("...ap,iab->...ibp", x, rule)
        return torch.einsum("...ibp,ipq->...bq", y, left).flatten(-2)
    y = torch.einsum("...ap,ipr->...iar", x, left)
    if right is None:
        return torch.einsum("...iar,iab->...br", y, rule).flatten(-2)
    y = torch.einsum("...iar,iab->...ibr", y, rule)
    return torch.einsum("...ibr,irq->...bq", y, right.to(x.dtype)).flatten(-2)


def hypercomplex_matrix(rule: Tensor, left: Tensor, right: Tensor | None = None) -> Tensor:
    """H itself, `[in, out]`."""
    b = left if right is None else left @ right
    return torch.einsum("iab,ipq->apbq", rule, b).flatten(0, 1).flatten(1)
