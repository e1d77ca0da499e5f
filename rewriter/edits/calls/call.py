"""The call of a branch: made in one way, whatever the word that inserts it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.fx import GraphModule, Node

from ...graph.aten import ancestors

Value = Node
"""A value of the graph; methods only hand it on."""

EMPTY: Mapping[str, None] = MappingProxyType({})


def given(reads: Mapping[str, Value | None]) -> dict[str, Value]:
    """The reads that exist: where nothing is padded, there is no mask to read."""
    return {name: value for name, value in reads.items() if value is not None}


def branch_call(
    gm: GraphModule, path: str, args: tuple[Any, ...], reads: Mapping[str, Value | None] = EMPTY
) -> Node:
    """A call of the module at `path`, at the graph's insertion point and named after the path.

    Args:
        args: its operands, by position.
        reads: the other values that it reads, by keyword; those that are None are left out.
    """
    name = path.replace(".", "_")
    return gm.graph.create_node("call_module", path, args, dict(given(reads)), name=name)


def latest(gm: GraphModule, reads: Mapping[str, Value]) -> Node:
    """The node behind which everything in `reads` is known."""
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    return max([last, *reads.values()])  # nodes compare by their places


def move_before(node: Node, place: Node) -> None:
    """Moves a value, with what it is computed from, in front of `place` where it stands behind."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if order[node] < order[place]:
        return
    late = sorted((n for n in ancestors(node) if order[n] > order[place]), key=order.__getitem__)
    for current in late:
        place.prepend(current)
