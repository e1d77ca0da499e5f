"""Deltas that were clearly added to a weight: told in one pass over it, in the dtype in which sums
are rounded. Where that is not clear, `certificate` tells, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..branches.branch import Branch, Delta, RowScale
from ..graph.module import same_view
from .blocks import BLOCK, Added, blocks
from .verdict import (
    TOLERANCE,
    Matrix,
    Verdict,
    drawn,
    largest_gap,
    rows_of,
    square,
)


def clearly_added(
    before: Matrix, after: Matrix, branches: Sequence[tuple[str, Branch]]
) -> Verdict | None:
    """The verdict of a weight that is the old one with what its branches add, for certain, and far
    from losing it; None where more has to be measured.

    Args:
        before, after: the weight; without a bias, or with the same.
        branches: (path, branch).
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    deltas = [branch for _, branch in branches if isinstance(branch, Delta)]
    only_deltas = len(deltas) == len(branches)
    if not only_deltas or before.weight.device.type == "mps" or not _same(before.bias, after.bias):
        return None
    return _verdict(before, after, [_Matrix(branch, wide, before.weight) for branch in deltas])


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return same_view(x) == same_view(y) or torch.equal(x, y)


class _Matrix:
    """What one branch adds, beside what it computes of random inputs in float64."""

    def __init__(self, branch: Delta, dtype: torch.dtype, like: Tensor) -> None:
        exact = Added(branch, torch.float64)
        self.added, self.square = exact.rounded(dtype), exact.square()
        self.buffer = like.new_empty((rows_of(like, BLOCK), like.shape[1]), dtype=dtype)
        self.gap = _gap(exact.branch, self.added, self.buffer[:1].expand(like.shape))

    def rows(self, rows: slice) -> Tensor:
        """Its next rows."""
        return self.added.rows(rows, self.buffer[: rows.stop - rows.start])


def _gap(alone: Delta | RowScale, added: Added, like: Tensor) -> float:
    """The relative difference between a branch in float64 and its matrix, of the size and dtype of
    `like`."""
    shape, width = alone.shape, like.new_empty((), dtype=torch.float64).expand(like.shape)
    x, operands = drawn(shape, width)
    with torch.no_grad():
        got = shape.samples(alone(x, **operands))
    x, operands = drawn(shape, like)
    if added.whole is None:  # beside a linear
        return largest_gap((x @ added.a.mT) @ added.b.mT, got)
    shape = shape.widened(like.dtype)
    return largest_gap(shape.samples(shape.applied(x, added.whole, **operands)), got)


def _verdict(before: Matrix, after: Matrix, deltas: Sequence[_Matrix]) -> Verdict | None:
    """See `clearly_added`: what is written may be off by its rounding, and that of the deltas."""
    old, new, first = before.weight, after.weight, deltas[0].buffer
    relative = 0.51 * (len(deltas) + before.roundings) * torch.finfo(after.dtype).eps
    sizes = [d.square for d in deltas]
    slack = sum(size**0.5 for size in sizes) / math.sqrt(max(1, old.numel()))
    allowed = 32 * torch.finfo(first.dtype).eps * slack  # that of all is at most the largest
    written, moved = torch.empty_like(first), torch.empty_like(first)
    off = went = 0.0
    size = sizes[0] if len(deltas) == 1 else 0.0
    for rows in blocks(old, BLOCK):
        count = rows.stop - rows.start
        rounded, error = _as(new[rows], written[:count]), moved[:count]
        torch.sub(rounded, _as(old[rows], error), out=error)
        went += square(error)
        if len(deltas) == 1:
            deltas[0].added.taken(error, rows)
        else:
            change = sum((d.rows(rows) for d in deltas[1:]), deltas[0].rows(rows))
            size += square(change)
            error.sub_(change)
        off += square(error)
        torch.abs(rounded, out=written[:count])
        if not float(error.abs_().sub_(written[:count], alpha=relative).amax()) <= allowed:
            return None
    along = (size + went - off) / 2  # of the change and what was moved
    gap = max(d.gap for d in deltas)
    if not (size and gap <= TOLERANCE / 10):
        return None
    verdict = Verdict(gap, math.sqrt(off / size), along / size)
    return None if verdict.vanished else verdict


def _as(tensor: Tensor, buffer: Tensor) -> Tensor:
    """A tensor, or a copy in a buffer of another dtype."""
    return tensor if tensor.dtype == buffer.dtype else buffer.copy_(tensor)
