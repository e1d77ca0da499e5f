"""Attention by dataflow: where a softmax, fused or not, stands between two products.

Its q, k and v are the nearest linears above, its o the nearest below.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..graph.aten import (
    ARITHMETIC,
    ATEN,
    CASTS,
    MATMULS,
    MULS,
    NORM_PARTS,
    POINTWISE,
    SLICES,
    SOFTMAX,
    VIEWS,
    inputs,
    is_op,
    operands,
    overloads,
    submodule,
    users,
)  # fmt: skip
from ..graph.modes import Attention
from .evaluation import Probe
from .walk import UP, Linear, Walk

_SCORES_UP = CASTS | VIEWS | SLICES | ARITHMETIC | POINTWISE | overloads("tanh", "max", "amax")
_WEIGHTS_DOWN = VIEWS | SLICES | CASTS | POINTWISE
_O_DOWN = VIEWS | SLICES | MULS | NORM_PARTS | overloads("sigmoid", "cat")


@dataclass
class Core:
    """One attention.

    Attributes:
        node: the weighted sum of the values.
        weights: what weighs them, or the fused operator.
        scores: the product of queries and keys, None if fused.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    weights: Node
    scores: Node | None

    @property
    def fused(self) -> bool:
        """Whether one operator computes it."""
        return self.scores is None

    def causal(self, probe: Probe) -> bool:
        """Whether no query sees a later key, by operator or by mask."""
        return probe.causal(self.weights, self.scores)


def cores(graph: Walk) -> list[Core]:
    """All attentions, in graph order."""
    attention_cores: list[Core] = []
    for node in graph.nodes:
        if isinstance(submodule(graph.gm, node), Attention):
            q, k, v = operands(node)[:3]
            attention_cores.append(Core(node, q, k, v, node, None))
        elif is_op(node, SOFTMAX) and (core := _unfused(graph, node)):
            attention_cores.append(core)
    return attention_cores


def _factors(graph: Walk, product: Node) -> tuple[Node, Node] | None:
    """The two operands of a product of activations, None if it is none."""
    two: Any = operands(product)[:2]
    if is_op(product, overloads("einsum")):
        two = operands(product)[1]
    elif is_op(product, ATEN.baddbmm.default):
        two = operands(product)[-2:]
    elif not is_op(product, MATMULS):
        return None
    if product in graph.linears or len(two) != 2 or not all(isinstance(o, Node) for o in two):
        return None
    return two[0], two[1]


def _unfused(graph: Walk, softmax: Node) -> Core | None:
    weighted_sum = _weighted_sum(graph, softmax)
    if weighted_sum is None:
        return None
    product, values, weights = weighted_sum
    wanted = {graph.source(graph.linears[n].x) for n in graph.climb(values, UP).found}
    best: Core | None = None
    seen: set[Node] = set()
    stack = inputs(softmax)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if two := _factors(graph, node):
            core = Core(product, *two, values, weights, node)
            keys = {graph.source(graph.linears[n].x) for n in graph.climb(two[1], UP).found}
            if keys & wanted:  # keys of the same tokens as the values, not of positions
                return core
            best = best or core
        elif is_op(node, _SCORES_UP):
            stack.extend(inputs(node))
    return best


def _weighted_sum(graph: Walk, softmax: Node) -> tuple[Node, Node, Node] | None:
    """The product of a softmax with values, the values and the weights, if it is an attention."""
    stack = [softmax]
    while stack:
        node = stack.pop()
        for user in users(node):
            two = _factors(graph, user)
            if two is not None and node in two:
                return user, two[1] if two[0] is node else two[0], node
            if is_op(user, _WEIGHTS_DOWN) or graph.is_dropout(user):
                stack.append(user)
    return None


def projections(graph: Walk, core: Core) -> dict[str, list[Linear]] | None:
    """The linears of q, k and v of an attention, in graph order."""
    parts: dict[str, list[Linear]] = {}
    for role, start in (("q", core.q), ("k", core.k), ("v", core.v)):
        linears = sorted(graph.climb(start, UP).found, key=graph.order.__getitem__)
        parts[role] = [graph.linears[n] for n in linears]
    return parts if all(parts.values()) else None


def outputs(graph: Walk, core: Core, nodes: Collection[Node]) -> list[Linear]:
    """The linear of o: the first among `nodes` that reads the attention's values."""
    return [p for p in graph.consumers(core.node, _O_DOWN) if p.node in nodes][:1]


def shares_source(graph: Walk, q: Linear, k: Linear) -> bool:
    """Whether queries and keys are computed from one value, the one from the other's at least."""
    first, second = graph.source(q.x), graph.source(k.x)
    return first is second or graph.depends(k.x, first) or graph.depends(q.x, second)
