"""The one place that knows what stands where in a linear over integers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from .aten import DEQUANTISE, is_quantised, loaded_operator


class QuantisedCall(NamedTuple):
    """The operands of `aten.QUANTISED`, in the operator's order.

    Attributes:
        x, bias: as in any linear; bias is None where there is none.
        codes, scale, zero: nodes of the stored tensors, see `weights/integers.Quantised`.
        bits, group: numbers.
    """

    x: Any
    codes: Node
    scale: Node
    zero: Node
    bias: Any
    bits: int
    group: int

    @staticmethod
    def of(node: object) -> QuantisedCall | None:
        """What a call reads; None if it is no linear over integers."""
        if not isinstance(node, Node) or not is_quantised(node):
            return None
        operands: Any = node.args
        return QuantisedCall(*operands)

    @property
    def stored(self) -> tuple[Node, Node, Node]:
        """The nodes of the stored tensors."""
        return self.codes, self.scale, self.zero

    def dense(self, size: int) -> tuple[Any, tuple[Any, ...]]:
        """(operator, operands) of the dense weight `[out, size]` of the same integers."""
        operator = loaded_operator(DEQUANTISE)
        return operator, (self.codes, self.scale, self.zero, self.bits, self.group, size)

    def write(self, node: Node) -> None:
        """Makes these the operands of a call."""
        node.args = tuple(self)
