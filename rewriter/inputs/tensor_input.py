"""One tensor that a program takes, and what it is where a call leaves it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Size = int | str


@dataclass(frozen=True)
class Absent:
    """What an input is that a call leaves out: one number, or numbers that count."""

    first: float | int | bool
    axis: int | None = None
    """The axis along which it counts upwards from `first`; without, it is `first` everywhere."""

    def tensor(
        self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Of the given sizes."""
        if self.axis is None:
            return torch.full(tuple(sizes), self.first, dtype=dtype, device=device)
        count = sizes[self.axis]
        line = torch.arange(count, device=device).add(self.first).to(dtype)
        along = [count if axis == self.axis else 1 for axis in range(len(sizes))]
        return line.view(along).expand(tuple(sizes)).contiguous()


@dataclass(frozen=True)
class TensorInput:
    """One tensor input. A size that is a string is dynamic and named by it."""

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    fill: float | int | bool = 0
    """A value that was valid in the captured example (its largest one for integers)."""
    optional: bool = False
    """A call may leave it out: it is `absent` then, or the example's, in the sizes of others."""
    values: tuple[int, int] | None = None
    """The smallest and the largest value that it may hold, if others mean nothing. Looking at them
    waits for the device."""
    start: tuple[float | int, ...] | None = None
    """What a call that leaves it out gets along its axes of fixed size, instead of `fill`."""

    absent: Absent | None = None
    """What the model itself takes where a call leaves it out, if that is not its example."""
    needed: str = ""
    """Why every call gives it, although the model's `forward` has a default."""

    def left_out(self, sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
        """What a call gets that does not give it."""
        if self.absent is None:
            return self.full(sizes, device)
        return self.absent.tensor(sizes, self.dtype, device)

    def full(self, sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Its example in other sizes."""
        if self.start is None:
            return torch.full(tuple(sizes), self.fill, dtype=self.dtype, device=device)
        start = torch.tensor(self.start, dtype=self.dtype, device=device)
        own = start.view([s if isinstance(s, int) else 1 for s in self.shape])
        return own.expand(tuple(sizes)).contiguous()
