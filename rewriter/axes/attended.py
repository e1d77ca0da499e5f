"""What is known of axes at an attention: heads, tokens and widths."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from ..graph.aten import (
    ARITHMETIC,
    ATEN,
    CASTS,
    DROPOUTS,
    MATMULS,
    POINTWISE,
    SLICES,
    SOFTMAX,
    VIEWS,
    inputs,
    is_op,
    operands,
    submodule,
)
from ..graph.modes import Attention
from .kinds import Kind
from .relation import Ref, owner, sizes_of

_UP = CASTS | VIEWS | SLICES | ARITHMETIC | POINTWISE | SOFTMAX | DROPOUTS
_PRODUCTS = MATMULS - {ATEN.addmm.default}


def attended(core: Node, gm: GraphModule) -> list[tuple[Ref, Kind]]:
    """Heads, tokens and widths where queries meet keys, and weights values."""
    rank = len(sizes_of(core))
    heads: list[tuple[Ref, Kind]] = [((core, 1), "head")] if rank == 4 else []
    if isinstance(submodule(gm, core), Attention):
        pairs = [(core, (-2, -1)), *((x, (-2, -1)) for x in inputs(core)[:2])]
    elif is_op(core, _PRODUCTS):
        first, second = operands(core)[-2:]
        if (scores := _scores(gm, first)) is not None:
            pairs = [(core, (-2, -1)), (first, (-1, None)), (scores, (None, -1))]
        elif (scores := _scores(gm, second)) is not None:
            pairs = [(core, (-1, -2)), (second, (-2, None)), (scores, (None, -1))]
        else:
            return heads
    else:
        return heads
    for value, places in pairs:
        for place, kind in zip(places, ("token", "width"), strict=True):
            if place is not None:
                heads.append(((owner(value), len(sizes_of(value)) + place), kind))
    return heads


def _scores(gm: GraphModule, weights: Node) -> Node | None:
    """What the product of queries and keys below a softmax multiplies, contracted last axis."""
    stack, seen = [(weights, is_op(weights, SOFTMAX))], set[Node]()
    while stack:
        node, below = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_op(node, _PRODUCTS):
            if below:
                return operands(node)[-2]
            continue
        module = submodule(gm, node)
        if (
            is_op(node, _UP)
            or isinstance(module, nn.Dropout)
            or getattr(module, "pointwise", False)
        ):
            stack += [(i, below or is_op(node, SOFTMAX)) for i in inputs(node)]
    return None
