"""What an operator may say of named axes, and how to say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .relation import Ref, Tie, aligned, extent, owner, sizes_of, tie


@dataclass(frozen=True, eq=False)
class Same:
    """Two axes are one."""

    a: Ref
    b: Ref


@dataclass(frozen=True, eq=False)
class Made:
    """Axis `b`, of the given size, is made from axis `a`: of its size, or of some of its indices,
    from `start` if they follow one another. Nothing goes back."""

    a: Ref
    b: Ref
    size: Any
    start: int | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """Axis `whole` has the axes `pieces` behind one another."""

    whole: Ref
    size: Any
    pieces: tuple[Ref, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """Axis `merged` is the row-major product of the `parts`, each with its size; along those in
    `copies` lies one thing, repeated."""

    merged: Ref
    parts: tuple[tuple[Ref, Any], ...]
    copies: frozenset[Ref] = frozenset()


Step = Same | Made | Row | Product


def size_at(ref: Ref, sizes: dict[str, tuple[int, ...]]) -> Any:
    """The size of an axis, of a node's value or of a stored tensor."""
    source, place = ref
    return sizes[source][place] if isinstance(source, str) else extent(sizes_of(source)[place])


def same(ties: list[Any]) -> list[Step]:
    return [Same(t.a, t.b) for t in ties if isinstance(t, Tie) and t.index is None]


def made(a: Node, i: int, b: Node, j: int, start: int | None = None) -> Made:
    size = sizes_of(b)
    return Made((owner(a), i), (owner(b), j % len(size)), extent(size[j]), start)


def like(source: Node, node: Node) -> list[Step]:
    """Every axis is the source's, index for index or with another size."""
    steps: list[Step] = []
    if len(sizes_of(source)) != len(sizes_of(node)):
        return steps
    for k in range(len(sizes_of(node))):
        steps += same(aligned(source, k, node, k)) or [made(source, k, node, k)]
    return steps


def repeated(a: Node, i: int, b: Node, j: int, times: Any) -> Product:
    """Axis `b` has every index of axis `a` so many times, behind one another."""
    place, copies = tie(a, i, b, j), (f"{b.name}.copies", 0)
    parts = ((place.a, extent(sizes_of(a)[i])), (copies, times))
    return Product(place.b, parts, frozenset({copies}))
