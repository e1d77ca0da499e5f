"""Running a graph node by node, at about the cost of its code, without making any.

Some nodes may be left out: what reads them reads something else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..graph.aten import attribute

Values = list[Any]
"""What nodes gave, by their place, and behind that the constants that they are called with."""


class Direct:
    """The forward of a graph module over keyword inputs by name.

    Args:
        gm: its modules and tensors are those that are there when it is called.
        instead: nodes that are left out, with what their readers read; None where nobody does.
    """

    def __init__(self, gm: GraphModule, instead: Mapping[Node, Node | None]) -> None:
        self.gm, self.graph = gm, gm.graph
        self._places: dict[Node, int] = {}
        self._constants: Values = []
        kept = [n for n in self.graph.nodes if n not in instead]
        self._size = len(kept)
        self._steps: list[tuple[int, Callable[[Values], Any], list[int]]] = []
        for place, node in enumerate(kept):
            self._places[node] = place
        for node in instead:
            if (end := _end(node, instead)) is not None:
                self._places[node] = self._places[end]
        last = {self._places[i]: node for node in kept for i in node.all_input_nodes}
        drops: dict[Node, list[int]] = {}
        for place, node in last.items():
            drops.setdefault(node, []).append(place)
        for node in kept:
            self._steps.append((self._places[node], self._step(node), drops.get(node, [])))

    def __call__(self, **given: Any) -> Any:
        """What the module returns."""
        values: Values = [None] * self._size + self._constants
        values.append(given)
        result: Any = None
        for place, step, drops in self._steps:
            values[place] = result = step(values)
            for each in drops:
                values[each] = None
        return self.graph.process_outputs(result)

    def _step(self, node: Node) -> Callable[[Values], Any]:
        target: Any = node.target
        if node.op == "placeholder":
            return lambda values: values[-1][target]
        if node.op == "get_attr":
            return lambda _: attribute(self.gm, target)
        if node.op == "output":
            return self._operand(node.args[0])
        function = self.gm.get_submodule(target) if node.op == "call_module" else target
        if node.op == "call_method":
            function = _method(target)
        args = self._operands(node.args)
        kwargs = {name: self._operand(item) for name, item in node.kwargs.items()}
        if not kwargs:
            return lambda values: function(*args(values))
        return lambda v: function(*args(v), **{n: k(v) for n, k in kwargs.items()})

    def _operands(self, items: tuple[Any, ...]) -> Callable[[Values], Any]:
        if not items:
            return lambda _: ()
        if any(self._is_nested(item) for item in items):
            each = [self._operand(item) for item in items]
            return lambda values: [take(values) for take in each]
        places = [self._place(item) for item in items]
        if len(places) == 1:
            (place,) = places
            return lambda values: (values[place],)
        return operator.itemgetter(*places)

    def _operand(self, item: Any) -> Callable[[Values], Any]:
        if self._is_nested(item):
            return lambda values: map_arg(item, lambda n: values[self._places[n]])
        return operator.itemgetter(self._place(item))

    def _place(self, item: Any) -> int:
        if isinstance(item, Node):
            return self._places[item]
        self._constants.append(item)
        return self._size + len(self._constants) - 1

    def _is_nested(self, item: Any) -> bool:
        """Whether an operand holds nodes, and is none."""
        if isinstance(item, Node):
            return False
        inside: list[Node] = []
        map_arg(item, inside.append)
        return bool(inside)


def _method(name: str) -> Callable[..., Any]:
    return lambda of, *args, **kwargs: getattr(of, name)(*args, **kwargs)


def _end(node: Node | None, instead: Mapping[Node, Node | None]) -> Node | None:
    while node is not None and node in instead:
        node = instead[node]
    return node
