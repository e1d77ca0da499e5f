"""Deltas that were clearly added to a weight: told in one pass over it, in the dtype in which sums
are rounded. Where that is not clear, `certificate` tells, in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..branches.branch import Branch, Delta
from ..graph.module import same_view
from .verdict import (
    TOLERANCE,
    Matrix,
    Verdict,
    alone_in,
    drawn,
    largest_gap,
    product,
    rows_of,
    square,
)

_BLOCK = 1 << 17
"""Elements of a weight that are compared at a time: their temporaries stay in the cache."""


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
    only_deltas = all(isinstance(branch, Delta) for _, branch in branches)
    if not only_deltas or before.weight.device.type == "mps" or not _same(before.bias, after.bias):
        return None
    deltas: list[Tensor] = []
    gap = 0.0
    for _, branch in branches:
        deltas.append(alone_in(branch, wide).full_delta())  # pyright: ignore
        gap = max(gap, _gap(branch, deltas[-1]))
    if not gap <= TOLERANCE / 10:
        return None
    return _verdict(before, after, deltas, len(branches) + before.roundings, gap)


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return same_view(x) == same_view(y) or torch.equal(x, y)


def _gap(branch: Branch, delta: Tensor) -> float:
    """The relative difference between a branch on random inputs, in float64, and its matrix."""
    alone = alone_in(branch, torch.float64)
    x, operands = drawn(alone.shape, delta.new_empty((), dtype=torch.float64).expand(delta.shape))
    narrow, _ = drawn(alone.shape, delta)
    want = branch.shape.widened(delta.dtype).applied(narrow, delta, **operands)
    return largest_gap(alone.shape.samples(want), alone.shape.samples(alone(x, **operands)))


def _verdict(
    before: Matrix, after: Matrix, deltas: Sequence[Tensor], rounds: int, gap: float
) -> Verdict | None:
    """See `clearly_added`: what is written may be off by its rounding, and that of the deltas."""
    old, new, delta = before.weight, after.weight, functools.reduce(torch.add, deltas)
    count = max(1, delta.numel())
    relative = 0.51 * rounds * torch.finfo(after.dtype).eps
    slack = sum(square(d) ** 0.5 for d in deltas) / math.sqrt(count)  # at most the largest element
    allowed = 32 * torch.finfo(delta.dtype).eps * slack
    off = along = 0.0
    for start in range(0, old.shape[0], step := rows_of(old, _BLOCK)):
        rows = slice(start, start + step)
        rounded, change = new[rows].to(delta), delta[rows]
        moved = rounded - old[rows]
        along += product(moved, change)
        error = moved.sub_(change).abs_()
        off += square(error)
        if not float(error.sub_(rounded.abs(), alpha=relative).amax()) <= allowed:
            return None
    size = square(delta)
    if not size:
        return None
    verdict = Verdict(gap, math.sqrt(off / size), along / size)
    return None if verdict.vanished else verdict
