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
