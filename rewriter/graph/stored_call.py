"""The one place that knows what stands where in a call over a stored format.

    operator(x, *parts, bias, *numbers)                            a linear
    dense(*parts, *numbers, size)                                  the matrix, as a value
    dense_rows(ids, *parts, *numbers, size, padding_idx, dtype)    a lookup of its rows

The operators' schemas name the parts, which are stored tensors, and the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .aten import SLICES, VIEWS, expression_of, is_op, shape

FORMATS: dict[str, str] = {}
"""Name of each operator -> that of the dense weight; filled by `weights/format.Format`."""

_ROWS = "_rows"


@dataclass(frozen=True)
class Stored:
    """A matrix in a stored format, as a call reads it.

    Attributes:
        operator: the name of the format's linear, such as `peftfx::quantised_linear`.
        parts: nodes of the stored tensors by the operator's names.
        numbers: integers by the operator's names.
    """

    operator: str
    parts: Mapping[str, Any]
    numbers: Mapping[str, int]

    @property
    def weight(self) -> str:
        """The name below which the parts are stored."""
        return str(next(iter(self.parts.values())).target).rpartition(".")[0]

    @property
    def rows(self) -> int:
        """How many rows the matrix has."""
        return int((shape(next(iter(self.parts.values()))) or (0,))[0])

    def dense(self, size: int) -> tuple[Any, tuple[Any, ...]]:
        """(operator, operands) of the dense weight `[rows, size]`."""
        operator = loaded_operator(FORMATS[self.operator])
        return operator, (*self.parts.values(), *self.numbers.values(), size)

    def lookup(self, ids: Any, size: int, padding: int | None, dtype: Any) -> Any:
        """(operator, operands) of rows of the dense weight, `[*ids, size]`."""
        operator = loaded_operator(FORMATS[self.operator] + _ROWS)
        values = (*self.parts.values(), *self.numbers.values())
        return operator, (ids, *values, size, padding, dtype)


@dataclass(frozen=True)
class StoredCall(Stored):
    """The operands of a linear over a stored format.

    Attributes:
        x, bias: as in any linear; bias is None where there is none.
    """

    x: Any
    bias: Any

    @staticmethod
    def of(node: object) -> StoredCall | None:
        """What a call reads; None if it is no linear over a stored format."""
        name, given = _named(node)
        if name not in FORMATS:
            return None
        names = list(given)
        end = names.index("bias")
        parts = {n: given[n] for n in names[1:end]}
        numbers = {n: given[n] for n in names[end + 1 :]}
        return StoredCall(name, parts, numbers, given[names[0]], given["bias"])

    @property
    def entries(self) -> int:
        """How many numbers the matrix has; of unknown inputs none."""
        columns = (shape(self.x) or (0,))[-1]
        return self.rows * columns if isinstance(columns, int) else 0

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
class Unpacked(Stored):
    """A call that computes the dense matrix of a stored format.

    Attributes:
        node: the call.
        size: columns.
    """

    node: Node
    size: int

    @staticmethod
    def of(node: object) -> Unpacked | None:
        """None if a node is no such call."""
        name, given = _named(node)
        operator = next((o for o, dense in FORMATS.items() if dense == name), None)
        if operator is None or not isinstance(node, Node):
            return None
        size = given.pop("size")
        return Unpacked(operator, *_sorted(given), node, size)

    @staticmethod
    def below(node: object) -> Unpacked | None:
        """What a value is laid out from, through views, casts and expressions of a stored weight;
        None if it is no such value."""
        while isinstance(node, Node) and Unpacked.of(node) is None:
            through = is_op(node, VIEWS) or is_op(node, SLICES) or expression_of(node)
            node = node.args[0] if through and node.args else None
        return Unpacked.of(node)

    @property
    def entries(self) -> int:
        """How many numbers the matrix has."""
        return self.rows * self.size

    def resize(self, size: int) -> None:
        """Says how many inputs there are."""
        self.node.args = (*self.node.args[:-1], size)


@dataclass(frozen=True)
class Lookup(Stored):
    """A lookup of rows of a stored format.

    Attributes:
        ids: which rows.
        size: columns.
        node: the call.
    """

    ids: Any
    size: int
    node: Node

    @staticmethod
    def of(node: object) -> Lookup | None:
        """None if a node is no such call."""
        name, given = _named(node)
        operator = next((o for o, dense in FORMATS.items() if dense + _ROWS == name), None)
        if operator is None or not isinstance(node, Node):
            return None
        ids, size = given.pop("ids"), given.pop("size")
        del given["padding_idx"], given["dtype"]
        return Lookup(operator, *_sorted(given), ids, size, node)

    def resize(self, size: int) -> None:
        """Says how many columns there are."""
        self.node.args = (*self.node.args[:-3], size, *self.node.args[-2:])

    @property
    def entries(self) -> int:
        """How many numbers the matrix has."""
        return self.rows * self.size


def _named(node: object) -> tuple[str, dict[str, Any]]:
    """(operator, operands by name) of a call of an operator of ours; '' of any other node."""
    if not isinstance(node, Node) or node.op != "call_function":
        return "", {}
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("peftfx::"):
        return "", {}
    values: Any = node.args
    return schema.name, dict(zip((a.name for a in schema.arguments), values, strict=False))


def _sorted(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Parts, which are nodes, and numbers."""
    parts = {n: v for n, v in given.items() if isinstance(v, Node)}
    return parts, {n: v for n, v in given.items() if n not in parts}


def loaded_operator(name: str) -> Any:
    """An operator of a library that is loaded, by its qualified name."""
    space, _, leaf = name.partition("::")
    return getattr(getattr(torch.ops, space), leaf).default
