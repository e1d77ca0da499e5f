"""The one place that knows what stands where in a linear over a stored format.

    operator(x, *parts, bias, *numbers)          dense(*parts, *numbers, size)

The operator's schema names the parts, which are stored tensors, and the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .aten import shape

FORMATS: dict[str, str] = {}
"""Name of each operator -> that of the dense weight; filled by `weights/format.Format`."""


@dataclass(frozen=True)
class StoredCall:
    """The operands of a call.

    Attributes:
        operator: its name, such as `peftfx::quantised_linear`.
        x, bias: as in any linear; bias is None where there is none.
        parts: nodes of the stored tensors by the operator's names.
        numbers: integers by the operator's names.
    """

    operator: str
    x: Any
    parts: Mapping[str, Any]
    bias: Any
    numbers: Mapping[str, int]

    @staticmethod
    def of(node: object) -> StoredCall | None:
        """What a call reads; None if it is no linear over a stored format."""
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name not in FORMATS:
            return None
        values: Any = node.args
        given = dict(zip((a.name for a in schema.arguments), values, strict=True))
        return StoredCall(schema.name, *_sorted(given))

    @property
    def weight(self) -> str:
        """The name below which the parts are stored."""
        return str(next(iter(self.parts.values())).target).rpartition(".")[0]

    @property
    def entries(self) -> int:
        """How many numbers the matrix has; of unknown inputs none."""
        columns = (shape(self.x) or (0,))[-1]
        rows = (shape(next(iter(self.parts.values()))) or (0,))[0]
        return rows * columns if isinstance(columns, int) else 0

    def dense(self, size: int) -> tuple[Any, tuple[Any, ...]]:
        """(operator, operands) of the dense weight `[out, size]`."""
        operator = loaded_operator(FORMATS[self.operator])
        return operator, (*self.parts.values(), *self.numbers.values(), size)

    def with_bias(self, bias: Any) -> StoredCall:
        """The same call with another bias."""
        return replace(self, bias=bias)

    def with_numbers(self, numbers: Mapping[str, int]) -> StoredCall:
        """The same call of parts that are laid out anew."""
        return replace(self, numbers=dict(numbers))

    @property
    def operands(self) -> tuple[Any, ...]:
        """In the operator's order."""
        return self.x, *self.parts.values(), self.bias, *self.numbers.values()

    def create(self, graph: Graph) -> Node:
        """A new call."""
        name = self.operator.partition("::")[2]
        target = loaded_operator(self.operator)
        return graph.create_node("call_function", target, self.operands, {}, name)

    def write(self, node: Node) -> None:
        """Makes these the operands of a call."""
        node.args = self.operands


@dataclass(frozen=True)
class Unpacked:
    """A call that computes the dense weight `[out, in]` of a stored format.

    Attributes:
        weight: the name below which the parts are stored.
    """

    node: Node
    weight: str

    @staticmethod
    def of(node: object) -> Unpacked | None:
        """None if a node is no such call."""
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name not in FORMATS.values():
            return None
        return Unpacked(node, str(node.all_input_nodes[0].target).rpartition(".")[0])

    def resize(self, size: int) -> None:
        """Says how many inputs there are."""
        self.node.args = (*self.node.args[:-1], size)


def _sorted(given: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Any, dict[str, int]]:
    """(x, parts, bias, numbers) of operands by name."""
    names = list(given)
    end = names.index("bias")
    parts = {n: given[n] for n in names[1:end]}
    return given[names[0]], parts, given["bias"], {n: given[n] for n in names[end + 1 :]}


def loaded_operator(name: str) -> Any:
    """An operator of a library that is loaded, by its qualified name."""
    space, _, leaf = name.partition("::")
    return getattr(getattr(torch.ops, space), leaf).default
