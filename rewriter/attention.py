"""Attention by dataflow: where a softmax, fused or not, stands between two products.

Its q, k and v are the nearest linears above, its o the nearest below.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .aten import (
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
from .modes import Attention
from .probe import Probe
from .walk import UP, Linear, Walk

_SCORES_UP = CASTS | VIEWS | SLICES | ARITHMETIC | POINTWISE | overloads("tanh", "max", "amax")
_WEIGHTS_DOWN = VIEWS | SLICES | CASTS | POINTWISE
_O_DOWN = VIEWS | SLICES | MULS | NORM_PARTS | overloads("sigmoid")


@dataclass
class Core:
    """One attention: `node` gives the weighted values; `scores` is its product if unfused."""

    node: Node
    q: Node
    k: Node
    v: Node
    softmax: Node
    scores: Node | None

    @property
    def fused(self) -> bool:
        """Whether one operator computes it."""
        return self.scores is None

    def causal(self, probe: Probe) -> bool:
        """Whether no query sees a later key, by operator or by mask."""
        return probe.causal(self.softmax, self.scores)


def cores(graph: Walk) -> list[Core]:
    """All attentions, in graph order."""
    found: list[Core] = []
    for node in graph.nodes:
        if isinstance(submodule(graph.gm, node), Attention):
            q, k, v = operands(node)[:3]
            found.append(Core(node, q, k, v, node, None))
        elif is_op(node, SOFTMAX) and (core := _unfused(graph, node)):
            found.append(core)
    return found


def _factors(product: Node) -> tuple[Node, Node] | None:
    two = operands(product)[-2:] if is_op(product, ATEN.baddbmm.default) else operands(product)[:2]
    if len(two) == 2 and all(isinstance(o, Node) for o in two):
        return two[0], two[1]
    return None


def _unfused(graph: Walk, softmax: Node) -> Core | None:
    product = _weighted_sum(graph, softmax)
    if product is None:
        return None
    values = operands(product)[1]
    if not isinstance(values, Node):
        return None
    wanted = {graph.source(graph.linears[n].x) for n in graph.climb(values, UP).found}
    best: Core | None = None
    seen: set[Node] = set()
    stack = inputs(softmax)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_op(node, MATMULS) and node not in graph.linears and (two := _factors(node)):
            core = Core(product, *two, values, softmax, node)
            keys = {graph.source(graph.linears[n].x) for n in graph.climb(two[1], UP).found}
            if keys & wanted:  # keys of the same tokens as the values, not of positions
                return core
            best = best or core
        elif is_op(node, _SCORES_UP):
            stack.extend(inputs(node))
    return best


def _weighted_sum(graph: Walk, softmax: Node) -> Node | None:
    """The product of a softmax with values, None if it is no attention's."""
    stack = [softmax]
    while stack:
        node = stack.pop()
        for user in users(node):
            if is_op(user, MATMULS) and user not in graph.linears and user.args[0] is node:
                return user
            if is_op(user, _WEIGHTS_DOWN) or graph.is_dropout(user):
                stack.append(user)
    return None


def projections(graph: Walk, core: Core) -> dict[str, list[Linear]] | None:
    """The linears of q, k, v (in graph order) and o of an attention."""
    parts: dict[str, list[Linear]] = {}
    for role, start in (("q", core.q), ("k", core.k), ("v", core.v)):
        found = sorted(graph.climb(start, UP).found, key=graph.order.__getitem__)
        parts[role] = [graph.linears[n] for n in found]
    if not all(parts.values()):
        return None
    taken = {p.node for found in parts.values() for p in found}
    after = [p for p in graph.consumers(core.node, _O_DOWN) if p.node not in taken]
    parts["o"] = after[:1]
    return parts


def shares_source(graph: Walk, q: Linear, k: Linear) -> bool:
    """Whether queries and keys are computed from one value, the one from the other's at least."""
    first, second = graph.source(q.x), graph.source(k.x)
    return first is second or graph.depends(k.x, first) or graph.depends(q.x, second)
