"""`einsum` with a stored operand as the product that it is: a linear, or one product an expert.

    bti,oi->bto       linear(x, W)                    also with W [in, out]
    ebti,eio->ebto    bmm(x [e, rows, i], W)          also with W [e, out, in]
    bti,eio->bteo     bmm of the same rows with the matrix of every expert
    ebti,ieo->ebto    the same with W [i, e, o], or [i, o, e]

Experts are the axis of W that rows have, too; where none is, the first that is not summed over.
Other equations stay as they are (several axes that are summed over).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..graph.aten import ATEN, LINEAR, attribute, is_op, overloads, value

_EINSUM = overloads("einsum")
_EQUATION = re.compile(r"(\w+),(\w+)->(\w+)")


@dataclass(frozen=True)
class Contraction:
    """A product of data and a stored matrix, or a stack of them; letters are axes.

    Attributes:
        x, w: the operands.
        x_axes, w_axes, out: the letters of each.
        size: the letter that is summed over.
        feature: that of the outputs.
        expert: that of the matrices, '' for one.
    """

    x: Node
    w: Node
    x_axes: str
    w_axes: str
    out: str
    size: str
    feature: str
    expert: str

    @property
    def rows(self) -> str:
        """The axes of x along which every entry is multiplied alone."""
        return "".join(a for a in self.x_axes if a not in (self.size, self.expert))

    @staticmethod
    def of(gm: GraphModule, node: Node) -> Contraction | None:
        """None if a node is no such product."""
        if not is_op(node, _EINSUM) or len(node.args) < 2:
            return None
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        letters = _EQUATION.fullmatch(equation)
        if letters is None or not isinstance(operands, list | tuple) or len(operands) != 2:
            return None
        one, two, out = letters.groups()
        first, second = operands
        if _is_stored(gm, first):
            one, two, first, second = two, one, second, first
        if not (_is_stored(gm, second) and isinstance(first, Node) and isinstance(second, Node)):
            return None
        return _contraction(first, second, one, two, out)


def _contraction(x: Node, w: Node, x_axes: str, w_axes: str, out: str) -> Contraction | None:
    summed = [a for a in w_axes if a in x_axes and a not in out]
    kept = [a for a in w_axes if a in out]
    shared = [a for a in kept if a in x_axes]
    expert = [*shared, *kept][0] if len(w_axes) == 3 and kept else ""
    features = [a for a in kept if a not in x_axes and a != expert]
    plain = all(len(set(axes)) == len(axes) for axes in (x_axes, w_axes, out))
    whole = set(out) == (set(x_axes) | set(w_axes)) - set(summed)
    if len(w_axes) not in (2, 3) or len(summed) != 1 or len(features) != 1:
        return None
    if not (plain and whole) or expert in (summed[0], features[0]):
        return None
    sizes = dict(zip(w_axes, value(w).shape, strict=True))
    mine: dict[str, Any] = dict(zip(x_axes, value(x).shape, strict=True))
    if any(mine.get(a, n) != n for a, n in sizes.items()):
        return None  # an axis of one is repeated
    return Contraction(x, w, x_axes, w_axes, out, summed[0], features[0], expert)


def _is_stored(gm: GraphModule, operand: object) -> bool:
    stored = isinstance(operand, Node) and operand.op == "get_attr"
    return stored and isinstance(attribute(gm, str(operand.target)), nn.Parameter)  # pyright: ignore[reportAttributeAccessIssue]


def plain_products(gm: GraphModule) -> None:
    """Writes the `einsum`s of a graph that multiply by a stored matrix as linears and batched
    products, in place. Values are the same up to the rounding of one product."""
    for node in list(gm.graph.nodes):
        part = Contraction.of(gm, node)
        if part is None:
            continue
        with gm.graph.inserting_before(node):
            write = _Writer(gm.graph, node)
            new = _stack(write, part) if part.expert else _linear(write, part)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


@dataclass(frozen=True)
class _Writer:
    """Adds nodes that stand where another one stood, with their values."""

    graph: Graph
    place: Node

    def call(self, operator: Any, *args: Any) -> Node:
        node = self.graph.call_function(operator, args)
        known: Any = map_arg(args, value)
        node.meta = {**self.place.meta, "val": operator(*known)}
        return node

    def ordered(self, x: Node, axes: str, wanted: str) -> Node:
        order = [axes.index(a) for a in wanted]
        return x if axes == wanted else self.call(ATEN.permute.default, x, order)

    def size(self, x: Node, axis: int) -> Any:
        known = value(x).shape[axis]
        return known if isinstance(known, int) else self.call(ATEN.sym_size.int, x, axis)


def _linear(write: _Writer, part: Contraction) -> Node:
    x = write.ordered(part.x, part.x_axes, part.rows + part.size)
    turned = part.w_axes.index(part.size) == 0
    w = write.call(ATEN.t.default, part.w) if turned else part.w
    return write.ordered(write.call(LINEAR, x, w), part.rows + part.feature, part.out)


def _stack(write: _Writer, part: Contraction) -> Node:
    rows, every = part.rows, part.expert in part.x_axes
    sizes = [write.size(part.x, part.x_axes.index(a)) for a in rows]
    experts, features = (
        value(part.w).shape[part.w_axes.index(a)] for a in (part.expert, part.feature)
    )
    size = value(part.x).shape[part.x_axes.index(part.size)]
    if every:
        x = write.ordered(part.x, part.x_axes, part.expert + rows + part.size)
        x = write.call(ATEN.reshape.default, x, [experts, -1, size])
    else:
        x = write.ordered(part.x, part.x_axes, rows + part.size)
        x = write.call(ATEN.reshape.default, x, [1, -1, size])
        x = write.call(ATEN.expand.default, x, [experts, -1, -1])
    w = _matrices(write, part)
    y = write.call(ATEN.bmm.default, x, w)
    y = write.call(ATEN.view.default, y, [experts, *sizes, features])
    return write.ordered(y, part.expert + rows + part.feature, part.out)


def _matrices(write: _Writer, part: Contraction) -> Node:
    """The stack as `[experts, in, out]`."""
    wanted = part.expert + part.size + part.feature
    if part.w_axes == part.expert + part.feature + part.size:
        return write.call(ATEN.transpose.int, part.w, 1, 2)
    return write.ordered(part.w, part.w_axes, wanted)
