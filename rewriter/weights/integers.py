"""Integers for weights: rounding to nearest by group, and how the integers are stored.

    W[i, j] = scale[i, G] (code[i, j] - zero[i, G]),   G = j // group

The layout is that of ONNX Runtime's MatMulNBits (com.microsoft): uint8 `[out, groups, bytes]`, the
first code of a group in the lowest bits of its first byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHRINK = tuple(1 - 0.02 * i for i in range(31))
"""How far the range of a group is clipped: each is tried."""

CHUNK = 1 << 20
"""Weights searched at a time: bounds the float64 temporaries."""


@dataclass(frozen=True)
class Quantised:
    """A quantised matrix, pure tensors.

    Attributes:
        codes: uint8 `[out, groups, bytes]`.
        scale: `[out, groups]`, at least float32.
        zero: uint8, packed along the groups (`[out, bytes]`), or floating `[out, groups]`.
        bits: 2, 4 or 8.
        group: columns a group; the last group of a row may have fewer.
        in_features: columns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    in_features: int

    def integers(self) -> Tensor:
        """The codes, uint8 `[out, in]`."""
        return unpack(self.codes, self.bits, self.group).flatten(1)[:, : self.in_features]

    def zeros(self) -> Tensor:
        """The zero points, `[out, groups]` in the dtype of the scales."""
        if self.zero.is_floating_point():
            return self.zero
        return unpack(self.zero, self.bits, self.codes.shape[1]).to(self.scale.dtype)

    def dense(self) -> Tensor:
        """The matrix, `[out, in]` in the dtype of the scales."""
        of = torch.arange(self.in_features, device=self.codes.device) // self.group
        offsets = self.integers().to(self.scale.dtype) - self.zeros()[:, of]
        return offsets * self.scale[:, of]

    def regrouped(self, group: int) -> Quantised:
        """The same matrix in smaller groups, which repeat the scales; `group` divides the old."""
        count = -(-self.in_features // group)
        repeat = self.group // group
        scale = self.scale.repeat_interleave(repeat, 1)[:, :count].contiguous()
        zero = self.zeros().repeat_interleave(repeat, 1)[:, :count].contiguous()
        if not self.zero.is_floating_point():
            zero = pack(zero.to(torch.uint8), self.bits)
        codes = pack(_grouped(self.integers(), group), self.bits)
        return replace(self, codes=codes, scale=scale, zero=zero, group=group)


def quantise(weight: Tensor, bits: int, group: int | None = None) -> Quantised:
    """Rounds to nearest, with the scale of each group that minimises its squared error.

    Each candidate clips the group's range (which includes 0) by a factor of `SHRINK` and rounds;
    its scale is then the least-squares one for its codes. The search runs in float64, so that
    the codes do not depend on the machine.

    Args:
        weight: `[out, in]`, floating; on the meta device the result has no values either.
        bits: 2, 4 or 8.
        group: columns that share a scale and a zero point; None for a whole row. `group * bits`
            must be a multiple of 8.
    """
    out, size = weight.shape
    group = size if group is None else min(group, size)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.is_meta:
        groups = -(-size // group)
        codes = weight.new_empty((out, groups, -(-group * bits // 8)), dtype=torch.uint8)
        zero = weight.new_empty((out, -(-groups * bits // 8)), dtype=torch.uint8)
        return Quantised(
            codes, weight.new_empty((out, groups), dtype=wide), zero, bits, group, size
        )
    rows = max(1, CHUNK // size)
    parts = [_search(w, bits, group) for w in weight.split(rows)]
    codes, scale, zero = (torch.cat(p) for p in zip(*parts, strict=True))
    return Quantised(codes, scale.to(wide), pack(zero, bits), bits, group, size)


def _search(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and unpacked zero points of a few rows."""
    most = (1 << bits) - 1
    w = _grouped(weight.double(), group)  # padded with 0, which every group represents exactly
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    full = (high - low) / most
    full = torch.where(full > 0, full, torch.ones_like(full))
    zero = (-low / full).round_()
    best = torch.full_like(full, -1.0)
    scale = full.clone()
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    for shrink in SHRINK:
        rounded = (w / (full * shrink).unsqueeze(-1)).round_().add_(zero.unsqueeze(-1))
        rounded.clamp_(0, most)
        offsets = rounded - zero.unsqueeze(-1)
        dot, norm = (w * offsets).sum(-1), offsets.square().sum(-1)
        fitted = dot / norm.clamp(min=1)  # least squares; the error is |w|^2 - dot^2 / norm
        gain = dot * fitted
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better & (norm > 0), fitted, scale)
        codes = torch.where(better.unsqueeze(-1), rounded.to(torch.uint8), codes)
    return pack(codes, bits), scale, zero.to(torch.uint8)


def _grouped(rows: Tensor, group: int) -> Tensor:
    """`[out, in]` -> `[out, groups, group]`, padded with zeros."""
    missing = -rows.shape[1] % group
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, group))


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 `[..., count]` -> uint8 `[..., bytes]`, the first value in the lowest bits."""
    each = 8 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    return (padded.unflatten(-1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undoes `pack`: uint8 `[..., bytes]` -> uint8 `[..., count]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count]
