"""Which values of a graph are by token: what depends on the tokens, and what is written at places
of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from ...graph.aten import SLICES, VIEWS, is_op, named_arguments, overloads, shape, users

EMPTY = overloads(
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
    "new_empty", "rand_like", "randn_like",
)  # fmt: skip
"""What takes the size of a value, not its entries."""

_BY_LIST = overloads("index_put", "_index_put_impl")


def carried_by(roots: Sequence[Node], symbol: str) -> set[Node]:
    """The nodes whose values depend on some, not on their number alone; and tensors that are
    written in place with such values, or at places along the axis of the size `symbol`."""
    carried = {*roots, *_marked(roots[0].graph.owning_module, symbol)}
    stack = list(carried)
    while stack:
        for user in users(stack.pop()):
            carriers = [] if user.op == "output" or is_op(user, EMPTY) else [user]
            fresh = {
                n for n in (*carriers, *(_written(n) for n in carriers)) if n is not None
            } - carried
            carried |= fresh
            stack += fresh
    return carried


def _marked(gm: GraphModule | None, symbol: str) -> Iterator[Node]:
    """The tensors that are written at some places along the tokens only."""
    for node in gm.graph.nodes if gm is not None else ():
        base = _written(node)
        if base is not None and any(_divides(n, symbol) for n in (*_way(node.args[0]), node)):
            yield base


def _divides(node: Node, symbol: str) -> bool:
    if not is_op(node, _BY_LIST | SLICES):
        return False
    sizes = [str(s) for s in shape(node.args[0]) or ()]
    if is_op(node, _BY_LIST):
        indices: Any = node.args[1]
        return any(i is not None and s == symbol for i, s in zip(indices, sizes, strict=False))
    axis = named_arguments(node).get("dim", 0)
    return bool(sizes) and sizes[axis] == symbol and [str(s) for s in shape(node) or ()] != sizes


def _written(node: Node) -> Node | None:
    """The tensor that a call writes into, through views of it; None if it writes into none."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None or not schema.name.endswith("_") or not isinstance(node.args[0], Node):
        return None
    return _way(node.args[0])[-1]


def _way(view: Any) -> list[Node]:
    """A view, what it is a view of, and so on."""
    way: list[Node] = [view]
    while is_op(way[-1], VIEWS | SLICES) and isinstance(way[-1].args[0], Node):
        way.append(way[-1].args[0])
    return way
