"""Products with stored matrices beside which no branch can stand, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.fx import Node

from ..graph.aten import SLICES, VIEWS, attribute, inputs, is_op, source_line
from ..graph.weighted_call import is_grouped
from .products import PRODUCTS, Reading
from .walk import Walk


def readings(graph: Walk) -> Iterator[Reading]:
    """The products of a value that depends on the input with a stored matrix that are no linear,
    each weight of each product once."""
    varying = [n for n in graph.nodes if n.op == "placeholder"]
    for node in graph.nodes:
        if node in graph.linears or not (is_op(node, PRODUCTS) or is_grouped(node)):
            continue
        fixed = [i for i in inputs(node) if not graph.depends_on_any(i, varying)]
        if len(fixed) == len(inputs(node)):
            continue
        for operand in fixed:
            for path, between in _stored(graph, operand).items():
                yield Reading(node, path, _why(node, between))


def _stored(graph: Walk, operand: Node) -> dict[str, list[Node]]:
    """The stored matrices that a value is computed from, with the steps between."""
    stored: dict[str, list[Node]] = {}
    seen: set[Node] = set()
    stack: list[tuple[Node, list[Node]]] = [(operand, [])]
    while stack:
        node, below = stack.pop()
        if node in seen or graph.weighted(node):
            continue  # what a linear multiplies by is the linear's
        seen.add(node)
        if node.op == "get_attr":
            tensor = attribute(graph.gm, str(node.target))
            if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                stored.setdefault(str(node.target), below)
            continue
        stack.extend((i, [*below, node]) for i in inputs(node))
    return stored


def _why(node: Node, steps: Sequence[Node]) -> str:
    line = source_line(node)
    where = f"{node.name}{f' ({line})' if line else ''}"
    changed = [s for s in steps if not is_op(s, VIEWS | SLICES)]
    if changed:
        return f"{changed[-1].name} changes its values before {where} multiplies by them"
    return f"{where} multiplies by {'a view of it' if steps else 'it'}, and is no plain linear"
