"""What stands where in a call that multiplies by a stored weight, whatever the operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from .aten import (
    ATEN,
    CONVS,
    EMBEDDING,
    LINEAR,
    TRANSPOSED_CONVS,
    data_index,
    is_op,
    named_arguments,
    operands,
    overloads,
)
from .quantised_call import QuantisedCall

CONVOLUTIONS = (CONVS - TRANSPOSED_CONVS) - overloads("convolution")
INDEX = overloads("index")


@dataclass(frozen=True)
class WeightedCall:
    """The operands of a call.

    Attributes:
        x: what it reads, also ids.
        weight: what it multiplies by; of integers their codes.
        bias: or None.
        operands: what else its branches read, by name, see `branches/shapes.Shape`.
    """

    x: Any
    weight: Any
    bias: Any = None
    operands: Mapping[str, Node] = field(default_factory=dict[str, Node])

    @staticmethod
    def of(node: Node) -> WeightedCall | None:
        """What a call reads; None if it multiplies by nothing."""
        parts = linear_parts(node)
        if parts is not None:
            return WeightedCall(*parts)
        given = named_arguments(node) if node.op == "call_function" else {}
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


def is_grouped(node: object) -> bool:
    """Whether a node multiplies groups of rows by a stack of matrices."""
    return (
        isinstance(node, Node) and node.op == "call_function" and "grouped_mm" in str(node.target)
    )


def linear_parts(node: Node) -> tuple[Any, Any, Any] | None:
    """(x, weight, bias) of a linear call, None if it is none; a quantised weight is its codes."""
    if (quantised := QuantisedCall.of(node)) is not None:
        return quantised.x, quantised.codes, quantised.bias
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
