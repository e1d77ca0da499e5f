"""2 of every 4 entries of a row: the rest is zero, and is not stored.

    W[i, 4 G + position[i, G, k]] = values[i, G, k],   k = 0, 1

The entries of the largest magnitude stay, as they are: Mishra et al. 2021, arXiv:2104.08378. What
has at most two entries in each group of four is stored without loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .format import Format
from .packed import grouped, pack, unpack

_GROUP, _KEPT = 4, 2


@dataclass(frozen=True)
class Sparse24(Format):
    """A matrix of pairs.

    Attributes:
        values: `[out, ceil(in / 4), 2]`, of the model's dtype.
        positions: uint8 `[out, bytes]`, 2 bits each, see `packed.pack`; ascending in a pair.
        in_features: columns.
        group: 4.
    """

    operator: ClassVar[str] = "peftfx::sparse24_linear"
    unpacks: ClassVar[str] = "peftfx::sparse24_dense"
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "values": ("out", "group", "pair"), "positions": ("out", "byte"),
    }  # fmt: skip
    numbers: ClassVar[tuple[str, ...]] = ("group",)
    scaled: ClassVar[str] = "values"
    own_columns: ClassVar[bool] = True

    values: Tensor
    positions: Tensor
    in_features: int
    group: int = _GROUP

    @classmethod
    def packed(cls, matrix: Tensor, **options: Any) -> Self:
        """
        Args:
            matrix: `[out, in]`.
            options: none.
        """
        parts = grouped(matrix, _GROUP)
        places = parts.abs().topk(_KEPT, -1).indices.sort(-1).values
        return cls(parts.gather(-1, places), _packed(places), matrix.shape[1], **options)

    @property
    def said(self) -> str:
        return "2 of 4 entries"

    @property
    def columns(self) -> int:
        return self.in_features

    def places(self) -> Tensor:
        """int64 `[out, groups, 2]`."""
        flat = unpack(self.positions, 2, self.values[0].numel())
        return flat.long().view(self.values.shape)

    def dense(self) -> Tensor:
        whole = self.values.new_zeros((*self.values.shape[:2], self.group))
        return whole.scatter(-1, self.places(), self.values).flatten(1)[:, : self.in_features]

    def replaced(self, exact: Tensor) -> Self:
        packed = type(self).packed(exact)
        return replace(packed, values=packed.values.to(self.values.dtype))

    def columns_scaled(self, factor: Tensor) -> Self:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        each = grouped(factor.to(wide).expand(self.rows, -1), self.group).gather(-1, self.places())
        return replace(self, values=(self.values.to(wide) * each).to(self.values.dtype))

    def slice(self, axis: str, index: Tensor) -> Self:
        part = super().slice(axis, index)
        if axis == "out":
            return part
        return replace(
            part, positions=_packed(self.places()[:, index[:: self.group] // self.group])
        )


def _packed(places: Tensor) -> Tensor:
    return pack(places.flatten(1).to(torch.uint8), 2)
