"""Matrices some rows at a time, in wide precision: a whole copy of a large one costs more than what
is done to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..branches.branch import Delta, RowScale
from .verdict import alone_in, product, rows_of, square

BLOCK = 1 << 18
"""Elements of a block: enough that calls do not count, and few enough for the cache."""


def widest(matrix: Tensor) -> torch.dtype:
    """What sums are accumulated in before they are rounded once: float64 where there is such."""
    return torch.float32 if matrix.device.type == "mps" else torch.float64


def blocks(matrix: Tensor, size: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, of about `size` elements each."""
    step = rows_of(matrix, size)
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def rounded(matrix: Tensor, change: Callable[[Tensor, slice], object]) -> Tensor:
    """A matrix with its rows changed in wide precision, rounded once; laid out as it is.

    Args:
        matrix: `[out, in]`; it is not changed.
        change: `(block, rows)` changes a wide copy of these rows in place.
    """
    result = torch.empty_like(matrix)
    wide = matrix.new_empty((rows_of(matrix, BLOCK), matrix.shape[1]), dtype=widest(matrix))
    with _disable_current_modes():  # what it takes was admitted: the rest is written in place
        for rows in blocks(matrix, BLOCK):
            block = wide[: rows.stop - rows.start].copy_(matrix[rows])
            change(block, rows)
            result[rows].copy_(block)
    return result


class Added:
    """The rows of the matrix `[out, in]` that a branch adds; never formed where it has factors."""

    def __init__(self, branch: Delta | RowScale, dtype: torch.dtype) -> None:
        self.branch = alone_in(branch, dtype)
        factors = None if branch.constants_read else self.branch.factors()
        self.whole = self.branch.full_delta().detach() if factors is None else None
        if factors is not None:
            a, b, scale = factors
            self.a, self.b = a.detach(), self.branch.spread(b * scale, 0.0).detach()

    def to(self, block: Tensor, rows: slice) -> None:
        """Adds some rows to those of a block of the same dtype."""
        if self.whole is None:
            block.addmm_(self.b[rows], self.a)
        else:
            block.add_(self.whole[rows])

    def taken(self, block: Tensor, rows: slice) -> None:
        """Subtracts some rows, for whoever checks what was added: code of its own."""
        if self.whole is None:
            block.addmm_(self.b[rows], self.a, alpha=-1)
        else:
            block.sub_(self.whole[rows])

    def rows(self, rows: slice, buffer: Tensor) -> Tensor:
        """Some rows; `buffer` holds as many, and may be written."""
        if self.whole is None:
            return torch.mm(self.b[rows], self.a, out=buffer)
        return self.whole[rows]

    def square(self) -> float:
        """The sum of the squares of all elements."""
        if self.whole is None:
            return max(0.0, product(self.b.mT @ self.b, self.a @ self.a.mT))
        return square(self.whole)

    def rounded(self, dtype: torch.dtype) -> Added:
        """The same in another dtype."""
        twin = copy.copy(self)
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(twin, name, tensor.to(dtype))
        return twin
