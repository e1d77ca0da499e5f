"""Rows that hold several samples, and what tells them apart there."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ...axes.named import NamedAxes
from ...graph.aten import (
    ARITHMETIC,
    CASTS,
    POINTWISE,
    SIZES,
    SLICES,
    SOFTMAX,
    VIEWS,
    ancestors,
    is_float,
    is_op,
    operands,
    overloads,
    reaches,
    strip,
    submodule,
)
from ...graph.modes import Attention
from ...program.state import State

_COMPARISONS = overloads("eq", "ne")
_CHOICES = VIEWS | CASTS | SLICES | overloads("index", "index_select", "gather", "contiguous")
_MASKING = _CHOICES | ARITHMETIC | POINTWISE | _COMPARISONS | overloads(
    "where", "masked_fill", "bitwise_and", "bitwise_or", "bitwise_not", "logical_and",
    "logical_or", "logical_not", "gt", "ge", "lt", "le", "zeros_like", "full_like",
)  # fmt: skip
"""What a mask goes through on its way to the scores."""


def packed_by(program: State, axes: NamedAxes) -> str:
    """Why a row may hold several samples, with the names of the inputs that tell them apart; empty
    where none does.

    Segment ids, places that start anew and bounds of samples have one thing in common: numbers by
    token are compared with themselves, every token's with every other's. A ready-made mask for
    pairs of tokens may say the same, or that rows are padded, or tokens causal: it is an input, so
    nothing else shows which.
    """
    for node in program.module.graph.nodes:
        if node.op == "placeholder" and _pairs(program, axes, node):
            return (
                f"a row may hold several samples, which {str(node.target)!r} tells apart by pairs"
            )
        if not is_op(node, _COMPARISONS) or axes.words(node).count("token") < 2:
            continue
        sides = [strip(a, _CHOICES) for a in operands(node)[:2] if isinstance(a, Node)]
        if len(sides) == 2 and sides[0] is sides[1] and not is_float(sides[0]):
            if names := sorted(_inputs(sides[0])):
                told = ", ".join(repr(name) for name in names)
                return f"a row holds several samples, which {told} tells apart"
    return ""


def _pairs(program: State, axes: NamedAxes, source: Node) -> bool:
    """Whether an input has a number for each pair of tokens that goes to the scores of attention,
    or says whether they count."""
    if axes.words(source).count("token") < 2:
        return False

    def stop(node: Node) -> bool:
        return is_op(node, SOFTMAX) or isinstance(submodule(program.module, node), Attention)

    return any(reaches(source, stop, lambda n: not (stop(n) or is_op(n, _MASKING))))


def _inputs(node: Node) -> Iterator[str]:
    """The inputs whose values, not sizes alone, a value depends on."""
    for source in ancestors(node, block=lambda n: is_op(n, SIZES)):
        if source.op == "placeholder" and not all(is_op(u, SIZES) for u in source.users):
            yield str(source.target)
