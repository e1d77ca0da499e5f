"""Codes into a table of values: few bits whose steps follow the weights' own distribution.

    W[i, j] = scale[i, G] table[code[i, j]],   G = j // group

`NF4` is the table of quantiles of a normal distribution: Dettmers et al., NeurIPS 2023,
arXiv:2305.14314. The scale of a group is its largest magnitude, and a code that of the nearest
value of the table (the lower one of two that are as near), as in bitsandbytes 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .format import Format, nearest
from .packed import grouped, pack, unpack

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

BLOCKS = (16, 32, 64, 128, 256)
"""Groups that ONNX Runtime's MatMulBnb4 has."""


@dataclass(frozen=True)
class Codebook(Format):
    """A matrix of codes.

    Attributes:
        codes: uint8 `[out, groups, bytes]`, see `packed.pack`.
        scale: `[out, groups]`, at least float32.
        table: ascending `[2 ** bits]`, of the dtype of the scale.
        bits: 2, 4 or 8.
        group: columns a group; the last group of a row may have fewer.
        in_features: columns.
    """

    operator: ClassVar[str] = "peftfx::codebook_linear"
    unpacks: ClassVar[str] = "peftfx::codebook_dense"
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "codes": ("out", "group", "byte"), "scale": ("out", "group"), "table": ("code",),
    }  # fmt: skip
    numbers: ClassVar[tuple[str, ...]] = ("bits", "group")
    scaled: ClassVar[str] = "scale"

    codes: Tensor
    scale: Tensor
    table: Tensor
    bits: int
    group: int
    in_features: int

    @classmethod
    def packed(cls, matrix: Tensor, **options: Any) -> Self:
        """
        Args:
            matrix: `[out, in]`.
            options: `group` (64; None for a row) and `table` (`NF4`), of 4, 16 or 256 values.
        """
        size = matrix.shape[1]
        group = min(options.get("group", 64) or size, size)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        table = torch.tensor(options.get("table", NF4), dtype=wide, device=matrix.device)
        bits = (table.numel() - 1).bit_length()
        scale = grouped(matrix.to(wide), group).abs().amax(-1)
        empty = cls(scale.new_empty(0, dtype=torch.uint8), scale, table, bits, group, size)
        return empty._coded(matrix)

    @property
    def said(self) -> str:
        return f"codes of {self.bits} bits"

    @property
    def columns(self) -> int:
        return self.in_features

    def values(self) -> Tensor:
        """The codes, uint8 `[out, in]`."""
        return unpack(self.codes, self.bits, self.group).flatten(1)[:, : self.in_features]

    def dense(self) -> Tensor:
        of = torch.arange(self.in_features, device=self.codes.device) // self.group
        return self.table.to(self.scale.dtype)[self.values().long()] * self.scale[:, of]

    def pack(self, layout: str) -> Self | None:
        """`matmulbnb4` has the table `NF4`, and groups that divide a row; whoever writes the file
        puts the first code of a byte into its high bits, as no operator of ours reads it."""
        if layout != "matmulbnb4":
            return super().pack(layout)
        known = self.table.float().tolist() == torch.tensor(NF4).tolist()
        if not known or self.group not in BLOCKS or self.in_features % self.group:
            return None
        return self

    def replaced(self, exact: Tensor) -> Self:
        """With the old scales or fresh ones, whichever is nearer in a row."""
        scale = grouped(exact, self.group).abs().amax(-1).to(self.scale)
        return nearest(exact, self._coded(exact), replace(self, scale=scale)._coded(exact))

    def _coded(self, matrix: Tensor) -> Self:
        """The nearest codes with these scales; those of a group of zeros stand for zero."""
        scale = self.scale.unsqueeze(-1)
        shares = grouped(matrix.to(self.scale.dtype), self.group) / torch.where(
            scale == 0, 1, scale
        )
        table = self.table.to(shares)
        borders = (table[1:] + table[:-1]) / 2
        if matrix.is_meta:
            codes = torch.empty_like(shares, dtype=torch.uint8)
        else:
            codes = torch.bucketize(shares.contiguous(), borders).to(torch.uint8)
        return replace(self, codes=pack(codes, self.bits))
