"""What can be said of the axes of values and of stored tensors.

A `Tie` says that one index of one axis is one index of another; a `Grid` that one axis is the
row-major product of several; a `Bundle` that some indices of one axis cannot be parted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

Ref = tuple[Node | str, int]
"""An axis: of a graph node's value, or of a stored tensor (by its name)."""


@dataclass(frozen=True, eq=False)
class Tie:
    """Index `i` of axis `b` is index `index[i]` of axis `a` (-1: none); None: the same index.

    `size` is that of axis `a`.
    """

    a: Ref
    b: Ref
    index: Tensor | None = None
    size: int = 0


@dataclass(frozen=True, eq=False)
class Grid:
    """Axis `merged` is the row-major product of the `parts`, each with its size."""

    merged: Ref
    parts: tuple[tuple[Ref, int], ...]


@dataclass(frozen=True, eq=False)
class Bundle:
    """The indices of an axis go together by runs of `size`."""

    axis: Ref
    size: int


Relation = Tie | Grid | Bundle
