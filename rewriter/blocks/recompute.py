"""Activations and norms of blocks computed again for the backward pass instead of kept.

An activation function, a product or a norm keeps what it reads, and the linear behind it keeps what
it returns, which follows from the first at little cost: selective activation recomputation
(Korthikanti et al. 2022, arXiv:2205.05198), value by value. Matrix products, attention and dropout
are not repeated. A compiler is told the same by the policy of a checkpoint around the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..graph.aten import (
    ADDS,
    CASTS,
    LINEAR,
    MATMULS,
    MULS,
    NORMS,
    SDPA,
    SLICES,
    VIEWS,
    inputs,
    is_op,
    overloads,
    strip,
    value,
    written,
)  # fmt: skip
from .hidden_names import names
from .substitutes import Kept, Recipe

CHEAP = CASTS | MULS | NORMS | overloads("gelu", "silu", "mish", "hardswish", "softplus", "elu")
"""Operators whose backward keeps what they read, and that cost little more than reading it."""

COSTLY = MATMULS | overloads(
    "addmm", "convolution", "_convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "sort", "topk",
) | {LINEAR, SDPA}  # fmt: skip
"""Operators that a compiler does not repeat, as those with random numbers and our own."""


class Recompute:
    """What a block calls behind each cheap value of its graph.

    Attributes:
        pure: nothing in the block is changed in place, so that a compiler may repeat it.
    """

    def __init__(self, kept: Kept, pure: bool) -> None:
        self.kept, self.pure = kept, pure
        self.operators: list[Callable[..., Tensor]] = []

    def __call__(
        self, value: Tensor, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Keeps how `value` was computed instead of it.

        Args:
            value: the value.
            place: of its operator in `operators`.
            args, kwargs: what the operator was given.
        """
        if not (self.kept.entered and value.requires_grad):
            return
        sources = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        own = value.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata == own for t in sources):
            return  # a cast that changes nothing
        if any(t.nbytes > value.nbytes and not self.kept.replaces(t) for t in sources):
            return
        self.kept.replace(value, Recipe(self.operators[place], args, kwargs))

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


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    costly = operator in COSTLY or operator.namespace == "peftfx"
    if costly or torch.Tag.nondeterministic_seeded in operator.tags:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def compiled() -> Any:
    """The contexts of a checkpoint that repeats what is not costly, for a compiler."""
    return create_selective_checkpoint_contexts(_policy)


def recompute(module: nn.Module) -> None:
    """Lets all blocks keep how cheap values are computed instead of the values."""
    for block in names(module).blocks:
        block.kept = block.kept or Kept()
        parts = (block, *block.regions)
        pure = not any(written(node) for part in parts for node in part.graph.nodes)
        for inner in parts:
            inner.recompute = Recompute(block.kept, pure)
            inner.trace(inner.recompute.told(inner.graph))
