"""Integers for weights: rounding to nearest by group, and how the integers are stored.

    W[i, j] = scale[i, G] (code[i, j] - zero[i, G]),   G = j // group

The layout is that of ONNX Runtime's MatMulNBits (com.microsoft): uint8 `[out, groups, bytes]`, the
first code of a group in the lowest bits of its first byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import ExportError
from .format import Format, nearest
from .packed import grouped, pack, unpack

SHRINK = tuple(1 - 0.02 * i for i in range(31))
"""How far the range of a group is clipped: each is tried."""

CHUNK = 1 << 20
"""Weights searched at a time: bounds the float64 temporaries."""


@dataclass(frozen=True)
class Quantised(Format):
    """A quantised matrix.

    Attributes:
        codes: uint8 `[out, groups, bytes]`.
        scale: `[out, groups]`, at least float32.
        zero: uint8, packed along the groups (`[out, bytes]`), or floating `[out, groups]`.
        bits: 2, 4 or 8.
        group: columns a group; the last group of a row may have fewer.
        in_features: columns.
    """

    operator: ClassVar[str] = "peftfx::quantised_linear"
    unpacks: ClassVar[str] = "peftfx::dequantise"
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "codes": ("out", "group", "byte"), "scale": ("out", "group"), "zero": ("out", "byte"),
    }  # fmt: skip
    numbers: ClassVar[tuple[str, ...]] = ("bits", "group")
    scaled: ClassVar[str] = "scale"

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    in_features: int

    @classmethod
    def packed(cls, matrix: Tensor, **options: Any) -> Self:
        """See `quantise`.

        Args:
            options: `bits`, `group`, and `real_zeros` for zero points in floating point.
        """
        real_zeros = options.pop("real_zeros", False)
        integers = quantise(matrix, **options)
        return cls(**vars(integers._real() if real_zeros else integers))

    @property
    def said(self) -> str:
        return f"{self.bits} bits"

    @property
    def columns(self) -> int:
        return self.in_features

    @property
    def fixed(self) -> dict[str, Tensor]:
        zero = self.zero
        if zero.is_floating_point():
            zero = pack(zero.to(torch.uint8), self.bits)
        return {"codes": self.codes, "zero": zero}

    def values(self) -> Tensor:
        """The codes, uint8 `[out, in]`."""
        return unpack(self.codes, self.bits, self.group).flatten(1)[:, : self.in_features]

    def zeros(self) -> Tensor:
        """The zero points, `[out, groups]` in the dtype of the scales."""
        if self.zero.is_floating_point():
            return self.zero
        return unpack(self.zero, self.bits, self.codes.shape[1]).to(self.scale.dtype)

    def dense(self) -> Tensor:
        of = torch.arange(self.in_features, device=self.codes.device) // self.group
        offsets = self.values().to(self.scale.dtype) - self.zeros()[:, of]
        return offsets * self.scale[:, of]

    def replaced(self, exact: Tensor) -> Self:
        """With the old scales or fresh ones, whichever is nearer in a row."""
        fresh = type(self).packed(
            exact, bits=self.bits, group=self.group, real_zeros=self.zero.is_floating_point()
        )
        scale, zero = self.scale.to(exact).unsqueeze(-1), self.zeros().to(exact).unsqueeze(-1)
        steps = grouped(exact, self.group) / torch.where(scale == 0, 1.0, scale)
        codes = (steps + zero).round_().clamp_(0, (1 << self.bits) - 1).to(torch.uint8)
        fresh = replace(fresh, scale=fresh.scale.to(self.scale), zero=fresh.zero.to(self.zero))
        return nearest(exact, replace(self, codes=pack(codes, self.bits)), fresh)

    def slice(self, axis: str, index: Tensor) -> Self:
        part = super().slice(axis, index)
        if axis == "out":
            return part
        part = replace(part, zero=self.zeros()[:, index[:: self.group] // self.group])
        return part if self.zero.is_floating_point() else part._packed_zeros()

    def pack(self, layout: str) -> Self | None:
        """`matmulnbits` has groups of powers of two from 16 on. Other groups are cut into such
        ones, which repeat the scale; the matrix is the same.

        Raises:
            ExportError: the layout is unknown, or cannot hold groups of this size.
        """
        if layout != "matmulnbits":
            return super().pack(layout)
        block = self.group & -self.group
        if block < 16 and self.codes.shape[1] == 1:  # padding completes a group of a row
            block = max(16, 1 << (self.group - 1).bit_length())
        if block < 16:
            raise ExportError(
                f"MatMulNBits has groups of 16, 32, 64, ... columns, and {self.group} is no "
                "multiple of 16. Quantise with group=16, 32, 64 or 128."
            )
        return self if block == self.group else self.regrouped(block)

    def regrouped(self, group: int) -> Self:
        """The same matrix in smaller groups, which repeat the scales; `group` divides the old."""
        count = -(-self.in_features // group)
        repeat = self.group // group
        scale = self.scale.repeat_interleave(repeat, 1)[:, :count].contiguous()
        zero = self.zeros().repeat_interleave(repeat, 1)[:, :count].contiguous()
        codes = pack(grouped(self.values(), group), self.bits)
        integers = replace(self, codes=codes, scale=scale, zero=zero, group=group)
        return integers if self.zero.is_floating_point() else integers._packed_zeros()

    def _real(self) -> Self:
        """With zero points in floating point."""
        return replace(self, zero=self.zeros())

    def _packed_zeros(self) -> Self:
        return replace(self, zero=pack(self.zero.to(torch.uint8), self.bits))


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
    w = grouped(weight.double(), group)  # padded with 0, which every group represents exactly
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
