"""Branches that map what a weight's calls read, linearly and without changing its width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..parts.parts import Part
from .branch import Branch, Expression
from .shapes import Shape


class InputMap(Branch):
    """`y = base(M x)`: maps what a linear's calls read, behind its input scales and before all
    that reads it, deltas included; folds into columns, `W M`.
    """

    slot = "input_map"
    reads = writes = "in"

    def mapped(self, x: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`M x`: `[..., in] -> [..., in]`."""
        raise NotImplementedError

    def adjoint(self, rows: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`rows M`: `[..., in] -> [..., in]`, for rows of a weight."""
        raise NotImplementedError

    def full_adjoint(self, rows: Tensor) -> Tensor:
        """`adjoint` with the constants that it reads."""
        return self.adjoint(rows, **self.constants)

    def forward(self, x: Tensor, **reads: Tensor) -> Tensor:
        last = self.features_last(x)
        return self.features_back(self.mapped(last, **self.constants, **reads).to(x.dtype))


class MappedWeight(Expression):
    """`W M`, computed anew on every forward; of a fused weight, its own rows.

    Attributes:
        map: M.
        own: rows of a fused weight, int64, or None for all.
    """

    own: Tensor | None

    def __init__(self, inner: InputMap, shape: Shape, features: Sequence[int] | None) -> None:
        super().__init__()
        self.map, self.shape = inner, shape
        own = None if features is None else torch.tensor(features)
        self.register_buffer("own", own, persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        """`w`: as it is stored."""
        dense = self.shape.matrix(w)
        wide = torch.promote_types(w.dtype, torch.float32)
        rows = dense if self.own is None else dense[self.own]
        rows = self.map.full_adjoint(rows.to(wide)).to(w.dtype)
        if self.own is not None:
            rows = dense.index_copy(0, self.own, rows)
        return self.shape.stored(rows)

    def part(self) -> Part | None:
        return self.map.part() if self.own is None else None

    def describe(self) -> str:
        return self.map.describe()
