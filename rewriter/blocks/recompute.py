"""Activations and norms of blocks computed again for the backward pass instead of kept.

An activation function, a product or a norm keeps what it reads, and the linear behind it keeps what
it returns, which follows from the first at little cost: selective activation recomputation
(Korthikanti et al. 2022, arXiv:2205.05198), value by value. Matrix products, attention and dropout
are not repeated. A compiler decides such things by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Graph

from ..aten import (
    ADDS,
    CASTS,
    MULS,
    NORMS,
    SLICES,
    VIEWS,
    inputs,
    is_op,
    overloads,
    strip,
    value,
    written,
)  # fmt: skip
from .kept import Kept, Recipe

if TYPE_CHECKING:
    from .module import Outlined

CHEAP = CASTS | MULS | NORMS | overloads("gelu", "silu", "mish", "hardswish", "softplus", "elu")
"""Operators whose backward keeps what they read, and that cost little more than reading it."""


class Recompute:
    """What a block calls behind each cheap value of its graph."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.operators: list[Callable[..., Tensor]] = []

    def __call__(
        self, made: Tensor, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Keeps how `made` was computed instead of it.

        Args:
            made: the value.
            place: of its operator in `operators`.
            args, kwargs: what the operator was given.
        """
        if not (self.kept.entered and made.requires_grad):
            return
        sources = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        own = made.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata == own for t in sources):
            return  # a cast that changes nothing
        if any(t.nbytes > made.nbytes and not self.kept.replaces(t) for t in sources):
            return
        self.kept.replace(made, Recipe(self.operators[place], args, kwargs))

    def told(self, graph: Graph) -> Graph:
        """The graph with a call behind each cheap value."""
        changed = {written(node) for node in graph.nodes}  # in place; None stands for nothing
        for node in list(graph.nodes):
            if not is_op(node, CHEAP) or written(node) or not isinstance(value(node), Tensor):
                continue
            if any(strip(n, VIEWS | SLICES) in changed for n in (node, *inputs(node))):
                continue
            if all(is_op(user, ADDS) for user in node.users):
                continue  # which keep nothing
            args = (node, len(self.operators), node.args, node.kwargs)
            self.operators.append(node.target)  # pyright: ignore
            with graph.inserting_after(node):
                graph.create_node("call_module", "recompute", args)
        return graph


def recompute(module: Outlined) -> None:
    """Lets all blocks keep how cheap values are computed instead of the values."""
    for block in module.blocks:
        block.kept = block.kept or Kept()
        for inner in (block, *block.regions):
            inner.recompute = Recompute(block.kept)
            inner.trace(inner.recompute.told(inner.graph))
