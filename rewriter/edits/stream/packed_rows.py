"""Rows that hold several samples, and what tells them apart there."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ...axes.named import NamedAxes
from ...graph.aten import (
    CASTS,
    SIZES,
    SLICES,
    VIEWS,
    ancestors,
    is_float,
    is_op,
    operands,
    overloads,
    strip,
)
from ...program.state import State

_COMPARISONS = overloads("eq", "ne")
_CHOICES = VIEWS | CASTS | SLICES | overloads("index", "index_select", "gather", "contiguous")


def packed_by(program: State, axes: NamedAxes) -> str:
    """Names of the inputs that tell apart several samples in one row; empty where none does.

    Segment ids, places that start anew and bounds of samples have one thing in common: numbers by
    token are compared with themselves, every token's with every other's.
    """
    for node in program.module.graph.nodes:
        if not is_op(node, _COMPARISONS) or axes.words(node).count("token") < 2:
            continue
        sides = [strip(a, _CHOICES) for a in operands(node)[:2] if isinstance(a, Node)]
        if len(sides) == 2 and sides[0] is sides[1] and not is_float(sides[0]):
            if names := sorted(_inputs(sides[0])):
                return ", ".join(repr(name) for name in names)
    return ""


def _inputs(node: Node) -> Iterator[str]:
    """The inputs whose values, not sizes alone, a value depends on."""
    for source in ancestors(node, block=lambda n: is_op(n, SIZES)):
        if source.op == "placeholder" and not all(is_op(u, SIZES) for u in source.users):
            yield str(source.target)
