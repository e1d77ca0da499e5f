"""Ties of operators that lay the same numbers out anew: views, slices, pieces, concatenations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph.aten import is_op, named_arguments, overloads
from .relation import Grid, Ref, Relation, Tie, aligned, extent, owner, sizes_of, without

Rule = Callable[[Node], list[Relation]]

DIVISIONS = overloads("split", "split_with_sizes", "chunk", "unbind", "tensor_split")

RESHAPES = overloads(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
)  # fmt: skip

_SWAPS = overloads("transpose", "swapaxes", "swapdims")

_TURNS = overloads("t", "mT", "numpy_T", "permute") | _SWAPS


def _reshape(node: Node) -> list[Relation]:
    """Axes that a view keeps, merges or parts: those between two places up to which both shapes
    hold the same number of elements."""
    source: Any = node.args[0]
    relations: list[Relation] = []
    for old, new in runs(sizes_of(source), sizes_of(node)):
        if len(old) == len(new) == 1:
            relations += aligned(source, old[0], node, new[0])
        elif len(old) == 1 < len(new):
            parts = tuple(((owner(node), k), sizes_of(node)[k]) for k in new)
            relations.append(Grid((owner(source), old[0]), parts))
        elif len(new) == 1 < len(old):
            parts = tuple(((owner(source), k), sizes_of(source)[k]) for k in old)
            relations.append(Grid((owner(node), new[0]), parts))
    return relations


def runs(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes with equal products; axes of size 1 are in none."""
    ends: list[dict[Any, list[int]]] = []
    for sizes in (old, new):
        product: Any = 1
        runs: dict[Any, list[int]] = {}
        for axis, size in enumerate(sizes):
            if str(size) != "1":
                product = product * extent(size)
                runs[product] = [axis]
        ends.append(runs)
    pairs: list[tuple[list[int], list[int]]] = [([], [])]
    shared = [p for p in ends[0] if p in ends[1]]
    for k, runs in enumerate(ends):
        waiting = iter([*shared])
        at, stop = 0, next(waiting, None)
        for product, axes in runs.items():
            if at == len(pairs):
                pairs.append(([], []))
            pairs[at][k].extend(axes)
            if product == stop:
                at, stop = at + 1, next(waiting, None)
    return [(a, b) for a, b in pairs if a and b]


def _turn(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    order = list(range(len(sizes_of(source))))
    if is_op(node, _SWAPS):
        i, j = (int(a) % len(order) for a in node.args[1:3])  # pyright: ignore[reportArgumentType]
        order[i], order[j] = order[j], order[i]
    elif is_op(node, overloads("permute")):
        order = [int(d) % len(order) for d in node.args[1]] if order else []  # pyright: ignore
    else:
        order = [*order[:-2], *reversed(order[-2:])]
    return [t for j, i in enumerate(order) for t in aligned(source, i, node, j)]


def span(node: Node, size: int) -> range | None:
    """The indices that a slice or narrow takes of an axis of that size, if they are known."""
    given = named_arguments(node)
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    if "length" in given:
        end = start + given["length"] if isinstance(start, int) else given["length"]
    if any(isinstance(x, Node) for x in (start, end, step)):
        return None
    return range(size)[slice(start, end, step)]


def _slice(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    axis = int(named_arguments(node).get("dim", 0)) % len(sizes_of(source))
    relations = [
        t for k in range(len(sizes_of(node))) if k != axis for t in aligned(source, k, node, k)
    ]
    size = sizes_of(source)[axis]
    taken = span(node, size) if isinstance(size, int) else None
    if taken is not None:
        index = torch.tensor(list(taken), dtype=torch.long)
        relations.append(Tie((owner(source), axis), (node, axis), index, size))
    return relations


def _select(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    return without(source, node, {int(named_arguments(node).get("dim", 0))}, keep=False)


def pieces(division: Node) -> tuple[int, list[int]] | None:
    """The axis that a split, chunk or the like divides, and the sizes of its pieces."""
    values: Any = division.meta.get("val")
    axis = int(named_arguments(division).get("dim", 0))
    shapes = [tuple(v.shape) for v in values or ()]
    if not shapes or is_op(division, overloads("unbind")):
        return None
    axis %= len(shapes[0])
    sizes = [s[axis] for s in shapes]
    return (axis, sizes) if all(isinstance(s, int) for s in sizes) else None


def piece(node: Node) -> list[Relation]:
    division: Any = node.args[0]
    number: Any = node.args[1]
    if not is_op(division, DIVISIONS):
        return []
    source = division.args[0]
    if is_op(division, overloads("unbind")):
        return without(source, node, {int(named_arguments(division).get("dim", 0))}, keep=False)
    extents = pieces(division)
    if extents is None:
        return []
    axis, sizes = extents
    index = torch.arange(sizes[number]) + sum(sizes[:number])
    ties = [t for k in range(len(sizes_of(node))) if k != axis for t in aligned(source, k, node, k)]
    return [*ties, Tie((owner(source), axis), (node, axis), index, sum(sizes))]


def _cat(node: Node) -> list[Relation]:
    sources: Any = node.args[0]
    axis = int(named_arguments(node).get("dim", 0)) % len(sizes_of(node))
    relations: list[Relation] = []
    begin = 0
    for source in sources:
        size = sizes_of(source)[axis]
        if not isinstance(size, int):
            begin = -1
        if begin >= 0:
            whole = sizes_of(node)[axis]
            relations.append(
                Tie((node, axis), (owner(source), axis), torch.arange(size) + begin, whole)
            )
            begin += size
        relations += [
            t for k in range(len(sizes_of(node))) if k != axis for t in aligned(source, k, node, k)
        ]
    return relations


def _repeat(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    given = named_arguments(node)
    axis, times = given.get("dim"), given.get("repeats")
    if not isinstance(axis, int) or not isinstance(times, int):
        return []
    axis %= len(sizes_of(source))
    relations = without(source, node, {axis}, keep=True)
    size = sizes_of(source)[axis]
    if isinstance(size, int):
        index = torch.arange(size * times) // times
        relations.append(Tie((owner(source), axis), (node, axis), index, size))
    return relations


def copies(node: Node) -> Iterator[Ref]:
    """Axes that an expansion makes by repeating the same values."""
    if not is_op(node, overloads("expand", "broadcast_to")):
        return
    source: Any = node.args[0]
    before, after = sizes_of(source), sizes_of(node)
    skipped = len(after) - len(before)
    for place, size in enumerate(after):
        if isinstance(size, int) and size > 1 and (place < skipped or before[place - skipped] == 1):
            yield node, place


VIEW_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (RESHAPES, _reshape),
    (_TURNS, _turn),
    (overloads("slice", "narrow"), _slice),
    (overloads("select"), _select),
    (overloads("cat"), _cat),
    (overloads("repeat_interleave"), _repeat),
)
