"""Branches that add something to what a linear reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .branch import Branch


class InputShift(Branch):
    """`y = base(x + f(x))`: adds to what a weight's calls read, deltas included."""

    slot = "input_shift"
    reads = writes = "in"
    not_foldable = "it is added to what the linear reads, and is not linear"

    def shift(self, x: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`f(x, **reads)`: `[..., in] -> [..., in]`."""
        raise NotImplementedError

    def forward(self, x: Tensor, **reads: Tensor) -> Tensor:
        x = self.features_last(x)
        return self.features_back(x + self.shift(x, **reads))
