"""What is measured at one folded weight, and by what measures."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..branches.branch import Branch
from ..branches.shapes import Shape
from ..graph.clone import clone

B = TypeVar("B", bound=Branch)

TOLERANCE = 1e-5
"""Largest relative difference between a branch's forward and its matrix."""
_BLOCK = 1 << 17
"""Elements that are compared at a time: their temporaries stay in the cache."""
LOST = 0.9
"""Rounding errors of more than this share of a change are worth a warning."""
_MAGNITUDES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Of the random inputs: what is linear is so at all of them."""
_SAMPLES = 2
"""Inputs of each magnitude."""


@dataclass(frozen=True)
class Matrix:
    """A weight `[out, in]` with its bias, of a stack `[count * out, in]`.

    Attributes:
        dtype: what the weight is rounded to.
        roundings: how often reading it rounds to that, beside the roundings of folding.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    roundings: int = 0


@dataclass(frozen=True)
class Verdict:
    """What was measured at one weight.

    Attributes:
        gap: largest relative difference between a branch and its matrix.
        lost: what rounding did to the change of the weight, relative to its size; may exceed 1.
        left: how much of the change is left along its own direction, where elements that jump by
            a whole step make up for those that stay.
    """

    gap: float
    lost: float = 0.0
    left: float = 1.0

    @property
    def survives(self) -> float:
        """The share of the change that is neither gone nor drowned in rounding errors."""
        return max(0.0, 1 - self.lost)

    @property
    def vanished(self) -> bool:
        """Whether nearly everything is lost: the change is gone, or drowns in rounding."""
        return self.left < 0.01 or self.lost > LOST

    def said(self, storage: str) -> str:
        """What a report says of it where it has vanished, or was packed again."""
        left = "nothing" if self.left < 0.01 else f"{self.left:.0%}"
        off = "" if self.left < 0.01 else (
            f" along its direction, and errors of {self.lost:.0%} of its size"
        )  # fmt: skip
        return f"rounding to {storage} left {left} of what was learnt{off}"


def rows_of(matrix: Tensor, block: int) -> int:
    """How many rows of a matrix are compared at a time, with so many elements at most."""
    rows = matrix.shape[0]
    return max(1, min(rows, block * rows // max(1, matrix.numel())))


def lost_share(old: Tensor, exact: Tensor, rounded: Tensor) -> float:
    """The share of a tensor's change that rounding it lost; `exact` is in float32 at least, of the
    shape of both others."""
    if rounded.dtype == exact.dtype:
        return 0.0
    change = lost = 0.0
    tensors = [torch.atleast_1d(t) for t in (old, exact, rounded)]
    step = rows_of(tensors[0], _BLOCK)
    for x, y, z in zip(*(t.split(step) for t in tensors), strict=True):
        change += square(y - x)
        lost += square(y - z)
    return math.sqrt(lost / change) if change else 0.0


def product(x: Tensor, y: Tensor) -> float:
    """The sum of products of all elements."""
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))


def square(x: Tensor) -> float:
    """The sum of squares of all elements."""
    return product(x, x)


def drawn(shape: Shape, matrix: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Random inputs of a call with such a matrix, drawn in float64, and its operands."""
    x, operands = _drawn(shape, tuple(matrix.shape))
    like = matrix if x.is_floating_point() else matrix.device
    return x.to(like, copy=True), {n: t.to(matrix.device) for n, t in operands.items()}


@functools.lru_cache(maxsize=8)
def _drawn(shape: Shape, size: tuple[int, ...]) -> tuple[Tensor, Mapping[str, Tensor]]:
    matrix = torch.empty((), dtype=torch.float64).expand(size)
    sizes = torch.tensor(_MAGNITUDES, dtype=torch.float64).repeat(_SAMPLES)
    return shape.drawn(matrix, sizes, torch.Generator().manual_seed(0))


def alone_in(branch: B, dtype: torch.dtype) -> B:
    """A copy of a branch in evaluation mode and in a dtype, with features on the last axis."""
    copies: dict[int, Any] = {}
    for parameter in branch.parameters():
        copies[id(parameter)] = nn.Parameter(_as(parameter, dtype), requires_grad=False)
    for buffer in branch.buffers():
        copies[id(buffer)] = _as(buffer, dtype).clone()
    alone: B = clone(branch, copies).eval()
    alone.axis, alone.lowered, alone.shape = -1, None, branch.shape.widened(dtype)
    return alone


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()


def largest_gap(want: Tensor, got: Tensor) -> float:
    """The largest relative difference of rows; a bias is as large as small rows, or larger."""
    size = torch.maximum(want.norm(dim=1), got.norm(dim=1))
    gaps = (got - want).norm(dim=1) / torch.where(size > 0, size, 1.0)
    return float(gaps.nan_to_num(float("inf")).max())
