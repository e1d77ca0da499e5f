"""Signs: one bit a weight, and a scale a group.

    W[i, j] = scale[i, G] (1 if sign[i, j] else -1),   G = j // group

The mean magnitude of a group is the scale with the least squared error: Liu et al., NeurIPS 2024,
arXiv:2402.10193, equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .format import Format
from .packed import grouped, pack, unpack


@dataclass(frozen=True)
class OneBit(Format):
    """A matrix of signs.

    Attributes:
        signs: uint8 `[out, groups, bytes]`, see `packed.pack`; a set bit is 1, also for 0.
        scale: `[out, groups]`, at least float32.
        group: columns a group; the last group of a row may have fewer.
        in_features: columns.
    """

    operator: ClassVar[str] = "peftfx::onebit_linear"
    unpacks: ClassVar[str] = "peftfx::onebit_dense"
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "signs": ("out", "group", "byte"), "scale": ("out", "group"),
    }  # fmt: skip
    numbers: ClassVar[tuple[str, ...]] = ("group",)
    scaled: ClassVar[str] = "scale"

    signs: Tensor
    scale: Tensor
    group: int
    in_features: int

    @classmethod
    def packed(cls, matrix: Tensor, **options: Any) -> Self:
        """
        Args:
            matrix: `[out, in]`.
            options: `group` (None for a row).
        """
        size = matrix.shape[1]
        group = min(options.get("group") or size, size)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        parts = grouped(matrix.to(wide), group)
        counts = grouped(torch.ones_like(matrix[:1], dtype=wide), group).sum(-1)
        signs = pack((parts >= 0).to(torch.uint8), 1)
        return cls(signs, parts.abs().sum(-1) / counts, group, size)

    @property
    def said(self) -> str:
        return "1 bit"

    @property
    def columns(self) -> int:
        return self.in_features

    def dense(self) -> Tensor:
        signs = unpack(self.signs, 1, self.group).to(self.scale.dtype) * 2 - 1
        return (signs * self.scale.unsqueeze(-1)).flatten(1)[:, : self.in_features]

    def replaced(self, exact: Tensor) -> Self:
        packed = type(self).packed(exact, group=self.group)
        return replace(packed, scale=packed.scale.to(self.scale))
