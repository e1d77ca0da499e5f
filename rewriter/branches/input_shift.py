"""Branches that add something to what a linear reads, or to what a lookup gives."""

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


class OutputShift(Branch):
    """`y = e + f(e)` with the value e of a table's lookup, all its other branches included."""

    slot = "output_shift"
    reads = writes = "out"
    not_foldable = "it is added to what is looked up, and is not linear"

    def shift(self, e: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`f(e, **reads)`: `[..., width] -> [..., width]`."""
        raise NotImplementedError

    def forward(self, e: Tensor, **reads: Tensor) -> Tensor:
        return e + self.shift(e, **reads)
