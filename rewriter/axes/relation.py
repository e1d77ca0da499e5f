"""What operators say of axes: that two are one, or that one is the product of several.

A `Tie` says that one index of one axis is one index of another; a `Grid` that one axis is the
row-major product of several; a `Bundle` that some indices of one axis cannot be parted. Sizes are
numbers or, of dynamic axes, expressions; those that are equal are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..graph.aten import shape

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
    parts: tuple[tuple[Ref, Any], ...]

    @property
    def fixed(self) -> bool:
        """Whether all sizes are numbers."""
        return all(isinstance(size, int) for _, size in self.parts)


@dataclass(frozen=True, eq=False)
class Bundle:
    """The indices of an axis go together by runs of `size`."""

    axis: Ref
    size: int


Relation = Tie | Grid | Bundle


def owner(node: Any) -> Node | str:
    """What the axes of a node's value belong to: the stored tensor that it loads, or itself."""
    return str(node.target) if node.op == "get_attr" else node


def tensors(args: Sequence[Any]) -> list[Node]:
    return [a for a in args if isinstance(a, Node) and shape(a) is not None]


def sizes_of(node: Node) -> tuple[Any, ...]:
    return shape(node) or ()


def extent(size: Any) -> Any:
    """A size as a number or as an expression of symbols, which compare by value."""
    return size if isinstance(size, int) else size.node.expr


def tie(a: Node, i: int, b: Node, j: int) -> Tie:
    return Tie((owner(a), i % len(sizes_of(a))), (owner(b), j % len(sizes_of(b))))


def aligned(a: Node, i: int, b: Node, j: int) -> list[Relation]:
    """A tie if both axes have the same size."""
    x, y = sizes_of(a)[i], sizes_of(b)[j]
    return [tie(a, i, b, j)] if str(x) == str(y) else []


def leading(a: Node, b: Node, last: int) -> list[Relation]:
    """Ties of the axes in front of the last ones, aligned from the right as in broadcasting."""
    count = min(len(sizes_of(a)), len(sizes_of(b)))
    return [t for k in range(last + 1, count + 1) for t in aligned(a, -k, b, -k)]


def elementwise(node: Node) -> list[Relation]:
    return [t for a in node.all_input_nodes if shape(a) is not None for t in leading(a, node, 0)]


def without(source: Node, node: Node, axes: set[int], keep: bool) -> list[Relation]:
    """Ties of the axes other than `axes`, which are gone from the result unless `keep`."""
    rank = len(sizes_of(source))
    gone = {a % rank for a in axes}
    left = [i for i in range(rank) if keep or i not in gone]
    return [t for j, i in enumerate(left) if i not in gone for t in aligned(source, i, node, j)]
