"""Ties of operators that take entries, put them together, or multiply by other than one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph.aten import (
    ATEN,
    CONVS,
    EMBEDDING,
    TRANSPOSED_CONVS,
    is_op,
    named_arguments,
    operands,
    overloads,
)
from .relation import Relation, Tie, aligned, leading, owner, sizes_of, tensors, tie, without
from .views import Rule

_FILLED = overloads(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
_LIKE = overloads("zeros_like", "ones_like", "full_like", "empty_like")


def _stack(node: Node) -> list[Relation]:
    sources: Any = node.args[0]
    axis = int(named_arguments(node).get("dim", 0)) % len(sizes_of(node))
    others = [k for k in range(len(sizes_of(node))) if k != axis]
    return [s for x in sources for i, k in enumerate(others) for s in aligned(x, i, node, k)]


def _index(node: Node) -> list[Relation]:
    """`x[:, i, j]`: the axes of the indices stand where those that they choose from stood."""
    source, indices = operands(node)[:2]
    places = [k for k, i in enumerate(indices) if i is not None]
    chosen = tensors([indices[k] for k in places])
    masks = any(i.meta["val"].dtype == torch.bool for i in chosen)
    if masks or len(chosen) != len(places) or places != list(range(places[0], places[-1] + 1)):
        return []
    rank = max(len(sizes_of(i)) for i in chosen)
    relations = [s for k in range(places[0]) for s in aligned(source, k, node, k)]
    for index in chosen:
        skipped = places[0] + rank - len(sizes_of(index))
        relations += [s for k in range(len(sizes_of(index)))
                  for s in aligned(index, k, node, skipped + k)]  # fmt: skip
    behind = len(sizes_of(source)) - places[-1] - 1
    return [*relations, *(s for k in range(-behind, 0) for s in aligned(source, k, node, k))]


def _index_select(node: Node) -> list[Relation]:
    source, axis, index = operands(node)[:3]
    relations = without(source, node, {int(axis)}, keep=True)
    return [*relations, *aligned(index, 0, node, int(axis))]


def _gather(node: Node) -> list[Relation]:
    source, axis, index = operands(node)[:3]
    others = without(source, node, {int(axis)}, keep=True)
    return [*others, *(t for k in range(len(sizes_of(node))) for t in aligned(index, k, node, k))]


def _embedding(node: Node) -> list[Relation]:
    given = named_arguments(node)
    ids = given["indices"]
    rows = [t for k in range(len(sizes_of(ids))) for t in aligned(ids, k, node, k)]
    return [*rows, tie(given["weight"], 1, node, -1)]


def _one_hot(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    return [s for k in range(len(sizes_of(source))) for s in aligned(source, k, node, k)]


def _einsum(node: Node) -> list[Relation]:
    equation, sources = operands(node)[:2]
    if "->" not in equation or "." in equation:
        return []
    left, right = str(equation).replace(" ", "").split("->")
    first: dict[str, tuple[Node, int]] = {}
    relations: list[Relation] = []
    for labels, tensor in zip((*left.split(","), right), (*sources, node), strict=True):
        for k, label in enumerate(labels):
            other, place = first.setdefault(label, (tensor, k))
            relations += aligned(other, place, tensor, k) if (other, place) != (tensor, k) else []
    return relations


def grouped(node: Node) -> list[Relation]:
    x, w = tensors(node.args[:2])
    if len(sizes_of(x)) != 2 or len(sizes_of(w)) != 3:
        return []
    ties = [*aligned(x, 0, node, 0), *aligned(x, 1, w, 1), *aligned(w, 2, node, 1)]
    return ties


def _baddbmm(node: Node) -> list[Relation]:
    added, a, b = tensors(node.args[:3])
    ties = [*leading(added, node, 0), *leading(a, node, 1), *leading(b, node, 2)]
    return [*ties, *aligned(b, -1, node, -1), *aligned(a, -1, b, -2)]


def _conv(node: Node) -> list[Relation]:
    """Channels; those of filters in groups are none, because a group keeps its size."""
    given = named_arguments(node)
    x, w, groups = given["input"], given["weight"], int(given.get("groups", 1))
    turned = is_op(node, TRANSPOSED_CONVS) or bool(given.get("transposed", False))
    out, inner = (1, 0) if turned else (0, 1)
    relations = aligned(x, 0, node, 0)
    if groups == 1:
        relations += [tie(x, 1, w, inner), tie(w, out, node, 1)]
    elif each(node):
        relations += [tie(x, 1, w, 0), tie(w, 0, node, 1)]
    elif turned:
        return relations
    biases = tensors([given.get("bias")]) if groups == 1 or each(node) else []
    return [*relations, *(tie(b, 0, node, 1) for b in biases)]


def each(node: Node) -> bool:
    """Whether a convolution has one filter for each channel."""
    given = named_arguments(node)
    groups, w = int(given.get("groups", 1)), given["weight"]
    return groups > 1 and sizes_of(given["input"])[1] == groups == sizes_of(w)[0]


def _put(node: Node) -> list[Relation]:
    """What is added or written at some places along one axis keeps the others."""
    given = named_arguments(node)
    target, axis = given["self"], int(given["dim"]) % len(sizes_of(node))
    sources = tensors([given.get("src", given.get("source")), given.get("index")])
    relations: list[Relation] = []
    for value in (target, *(v for v in sources if len(sizes_of(v)) == len(sizes_of(node)))):
        places = (k for k in range(len(sizes_of(node))) if k != axis or value is target)
        relations += [t for k in places for t in aligned(value, k, node, k)]
    return relations


def _filled(node: Node) -> list[Relation]:
    """One number everywhere, whatever the sizes: every axis is tied to itself alone."""
    return [Tie((owner(node), k), (owner(node), k)) for k in range(len(sizes_of(node)))]


def _alike(node: Node) -> list[Relation]:
    source: Any = node.args[0]
    return [t for k in range(len(sizes_of(node))) for t in aligned(source, k, node, k)]


GATHER_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (frozenset({EMBEDDING}), _embedding),
    (overloads("stack"), _stack),
    (overloads("index"), _index),
    (overloads("index_select"), _index_select),
    (overloads("gather"), _gather),
    (overloads("index_add", "index_copy", "scatter_add", "scatter"), _put),
    (overloads("one_hot"), _one_hot),
    (overloads("einsum"), _einsum),
    (frozenset({ATEN.baddbmm.default}), _baddbmm),
    (CONVS, _conv),
    (_FILLED, _filled),
    (_LIKE, _alike),
)
