"""What stands where in a call that multiplies by a stored weight, whatever the operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from .aten import (
    ATEN,
    CONVS,
    EMBEDDING,
    LINEAR,
    is_op,
    named_arguments,
    operands,
    overloads,
    parameter_of,
)
from .stored_call import Lookup, Stored, StoredCall, Unpacked

CONVOLUTIONS = CONVS - overloads("convolution")
INDEX = overloads("index")


@dataclass(frozen=True)
class WeightedCall:
    """The operands of a call.

    Attributes:
        x: what it reads, also ids.
        weight: what it multiplies by; of a stored format its first part.
        bias: or None.
        operands: what else its branches read, by name, see `branches/shapes.Shape`.
        stored: what the call's own operator reads where that is one of a stored format.
    """

    x: Any
    weight: Any
    bias: Any = None
    operands: Mapping[str, Node] = field(default_factory=dict[str, Node])
    stored: Stored | None = None

    @staticmethod
    def of(node: Node) -> WeightedCall | None:
        """What a call reads; None if it multiplies by nothing."""
        if node.op != "call_function":
            return None
        if (parts := linear_parts(node)) is not None:
            return WeightedCall(*parts)
        if (stored := StoredCall.of(node)) is not None:
            weight = next(iter(stored.parts.values()))
            return WeightedCall(stored.x, weight, stored.bias, stored=stored)
        if (lookup := Lookup.of(node)) is not None:
            return WeightedCall(lookup.ids, next(iter(lookup.parts.values())), stored=lookup)
        given = named_arguments(node)
        if is_op(node, CONVS):
            return WeightedCall(given["input"], given["weight"], given.get("bias"))
        if is_op(node, EMBEDDING):
            return WeightedCall(given["indices"], given["weight"])
        if is_op(node, INDEX):
            ids = given["indices"]
            return WeightedCall(ids[0], given["self"]) if len(ids) == 1 else None
        if is_op(node, ATEN.bmm.default):
            pair = operands(node)[:2]
            return WeightedCall(*(pair[::-1] if data_index(node) else pair))
        if is_grouped(node):
            x, weight = operands(node)[:2]
            ends = given.get("offs", operands(node)[2] if len(node.args) > 2 else None)
            known = {"ends": ends} if isinstance(ends, Node) else {}
            return WeightedCall(x, weight, given.get("bias"), known)
        return None


def looked_up(node: Node) -> Node | None:
    """The ids by which a node looks up an embedding, dense or of stored rows; None if it does
    not."""
    lookup = Lookup.of(node)
    ids: Any = node.args[1] if is_op(node, EMBEDDING) else lookup.ids if lookup else None
    return ids if isinstance(ids, Node) else None


def stored_of(call: Node | None) -> Stored | None:
    """The stored format of what a call multiplies by, read by its operator or as a value; None
    where that is a dense tensor."""
    parts = None if call is None else WeightedCall.of(call)
    if parts is None:
        return None
    return parts.stored or Unpacked.below(parts.weight)


def is_grouped(node: object) -> bool:
    """Whether a node multiplies groups of rows by a stack of matrices."""
    return (
        isinstance(node, Node) and node.op == "call_function" and "grouped_mm" in str(node.target)
    )


def linear_parts(node: Node) -> tuple[Any, Any, Any] | None:
    """(x, weight, bias) of a call of one of torch's linears, None if it is none."""
    if is_op(node, LINEAR):
        x, weight, bias = (*operands(node), node.kwargs.get("bias"))[:3]
        return x, weight, bias
    if is_op(node, ATEN.addmm.default):
        bias, x, weight = operands(node)[:3]
        return x, weight, bias
    if is_op(node, ATEN.matmul.default) or is_op(node, ATEN.mm.default):
        x, weight = operands(node)[:2] if not data_index(node) else operands(node)[1::-1]
        return x, weight, None
    return None


def data_index(call: Node) -> int:
    """Which argument of a linear call is its input: not the first in `addmm` and `W @ x`."""
    if is_op(call, LINEAR) or call.op != "call_function":
        return 0
    if is_op(call, ATEN.addmm.default):
        return 1
    return int(parameter_of(call.args[0]) is not None and parameter_of(call.args[1]) is None)


def data_of(call: Node) -> Any:
    """What a linear call reads beside its weight, also where branches stand in its place."""
    return operands(call)[data_index(call)]


def redirect(call: Node, x: Node) -> None:
    """Lets a call of a weight read another input."""
    call.update_arg(data_index(call), x)


def linear_call(graph: Graph, x: Any, weight: Node, bias: Any, in_out: bool = False) -> Node:
    """A new call of a linear whose weight is `[out, in]`, or `[in, out]` with `in_out`."""
    if in_out:
        weight = graph.call_function(ATEN.t.default, (weight,))
    return graph.call_function(LINEAR, (x, weight, bias))


def take_bias(call: Node, bias: Node) -> bool:
    """Gives a call of a weight its bias; returns whether its operator has a place for one."""
    stored = StoredCall.of(call)
    if stored is not None:
        stored.with_bias(bias).write(call)
    elif is_op(call, CONVS | {LINEAR}):
        call.args = (*call.args[:2], bias, *call.args[3:])
    return stored is not None or is_op(call, CONVS | {LINEAR})
