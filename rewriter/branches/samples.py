"""Where samples lie in what a branch reads, and what belongs to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["alone", "slow", "fast"]
"""How samples lie along an axis: alone, or as the slowest or the fastest factor of a product."""


@dataclass(frozen=True)
class Samples:
    """Where samples lie in a value.

    Attributes:
        axis: of the samples, counted from the front.
        order: whether they lie there alone, or beside what belongs to each.
    """

    axis: int
    order: Order = "alone"

    def spread(self, given: Tensor, places: int) -> Tensor:
        """What is given for each sample, `[batch, ...]`, for each of the places along the axis."""
        if self.order == "alone":
            return given
        count, rest = given.shape[0], given.shape[1:]
        times = places // count
        if self.order == "slow":
            return given[:, None].expand(count, times, *rest).flatten(0, 1)
        return given[None].expand(times, count, *rest).flatten(0, 1)

    def joined(self, y: Tensor, places: int) -> Tensor:
        """`y` with samples, and 1 or all that belongs to one, on two axes, put on one."""
        sizes = [-1] * y.dim()
        other = self.axis + (self.order != "fast")
        sizes[other] = places // y.shape[self._own]
        return y.expand(sizes).flatten(self.axis, self.axis + 1)

    def first(self, x: Tensor, count: int) -> Tensor:
        """`x` with samples on an axis of their own, in front: `[count, ...]`."""
        if self.order == "alone":
            return x.movedim(self.axis, 0)
        # A fresh copy, because the strides of a merged axis cannot be split for all sizes alike.
        laid = x.clone(memory_format=torch.contiguous_format)
        sizes = (count, -1) if self.order == "slow" else (-1, count)
        return laid.unflatten(self.axis, sizes).movedim(self._own, 0)

    def back(self, y: Tensor) -> Tensor:
        """Undoes `first`."""
        laid = y.movedim(0, self._own)
        return laid if self.order == "alone" else laid.flatten(self.axis, self.axis + 1)

    @property
    def _own(self) -> int:
        """The samples' own axis, once they are apart."""
        return self.axis + (self.order == "fast")


FIRST = Samples(0, "slow")
"""Samples in front, each with all that belongs to it."""
