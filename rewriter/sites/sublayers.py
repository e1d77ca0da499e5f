"""What a residual branch is: attention, feed-forward (dense or experts), token mixer, convolution.

A feed-forward block is a linear that is computed from one or two others by element-wise steps
alone, an activation among them. A mixer is any other branch between linears (state spaces,
linear attention, gated convolutions).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ..graph.aten import (
    ACTIVATIONS,
    ADDS,
    GATHERS,
    MULS,
    TOP,
    VIEWS,
    inputs,
    is_op,
    overloads,
    users,
)
from .attention import Core
from .evaluation import Probe
from .residual import Sublayer
from .walk import FFN_UP, OUT, Linear, Walk

_TO_OUTPUT = FFN_UP | GATHERS | overloads("sum", "index_add", "index_add_", "einsum", "scatter_add")
_WRITTEN_OUT = {("tanh", "cubic"): "gelu", ("sigmoid", "scaled"): "gelu", ("erf", "scaled"): "gelu"}
_TO_CHOICE = VIEWS | ACTIVATIONS | overloads("softmax", "add", "add_", "masked_fill", "mul")


Features = dict[tuple[str, str], tuple[int, ...]]


Part = tuple[str, Linear, tuple[int, ...]]
"""A role, a linear, and the features of it that play the role."""


@dataclass
class Draft:
    """The linears that play each role of one block.

    Attributes:
        kind: `attn`, `ffn` or `mixer`.
        parts: role -> linears.
        features: (role, weight) -> the features of a fused weight that play the role.
    """

    kind: str
    parts: dict[str, list[Linear]]
    core: Core | None = None
    activation: str = ""
    cross: bool = False
    sublayer: Sublayer | None = None
    features: Features = field(default_factory=dict[tuple[str, str], tuple[int, ...]])

    @property
    def experts(self) -> bool:
        """Whether its weights are stacks of experts."""
        return any(p.stack for linears in self.parts.values() for p in linears)


def feed_forward(
    graph: Walk, probe: Probe, down: Linear, nodes: set[Node], width: object
) -> Draft | None:
    """The feed-forward block that ends in `down` and lies within `nodes`, None if there is none.

    It gives as many features as it takes, or as the stream has (`width`).
    """
    climb = graph.climb(down.x, FFN_UP)
    ups = {n: a for n, a in climb.found.items() if n in nodes and n is not down.node}
    if not any(ups.values()) or len(ups) > 2 or climb.stopped & nodes:
        return None
    if any(bool(graph.linears[n].stack) != bool(down.stack) for n in ups):
        return None
    if down.sizes[1] not in {graph.linears[n].sizes[0] for n in ups} | {width}:
        return None
    gate, up, features = _gated(graph, probe, down.x, set(ups))
    parts = {"ffn.up": [up or graph.linears[max(ups, key=graph.order.__getitem__)]]}
    parts |= {"ffn.gate": [gate] if gate else [], "ffn.down": [down]}
    return Draft("ffn", parts, activation=_activation(graph, down.x, nodes), features=features)


def _activation(graph: Walk, start: Node, nodes: set[Node]) -> str:
    """The name of the nearest activation above `start`, also of ones that are written out."""
    seen: set[Node] = set()
    queue = [start]
    while queue:
        node = queue.pop(0)
        if is_op(node, ACTIVATIONS):
            name = str(node.target).split(".")[1].removesuffix("_")
            return _WRITTEN_OUT.get((name, _argument(node)), name)
        if node in nodes and node not in seen and node not in graph.linears:
            seen.add(node)
            queue.extend(inputs(node))
    return ""


def _argument(activation: Node) -> str:
    """What an activation is applied to: `scaled` x, a `cubic` polynomial of x, or plain x."""
    node = inputs(activation)[0]
    if not is_op(node, MULS):
        return ""
    if any(is_op(i, ADDS) for i in inputs(node)):
        return "cubic"
    return "scaled" if len(inputs(node)) == 1 else ""


def _gated(
    graph: Walk, probe: Probe, start: Node, linears: set[Node]
) -> tuple[Linear | None, Linear | None, Features]:
    """(gate, up, features of fused ones) at the product of two projections, one activated."""
    seen: set[Node] = set()
    queue = [start]
    while queue:
        node = queue.pop(0)
        if node in seen or node in graph.linears or not graph.passes(node, FFN_UP):
            continue
        seen.add(node)
        queue.extend(inputs(node))
        factors = [a for a in node.args[:2] if isinstance(a, Node)]
        if not is_op(node, MULS) or len(factors) != 2:
            continue
        sides = [
            {n: a for n, a in graph.climb(f, FFN_UP).found.items() if n in linears} for f in factors
        ]
        if not all(sides):
            continue
        active = [any(s.values()) for s in sides]
        first = 0 if active[0] else 1
        gate, up = (graph.linears[next(iter(sides[i]))] for i in (first, 1 - first))
        if gate is not up:
            return gate, up, {}
        axis = -2 if gate.left else -1
        gates, ups = (probe.features(gate.node, factors[i], axis) for i in (first, 1 - first))
        if not set(gates) & set(ups):
            return (
                gate,
                up,
                {
                    ("ffn.gate", gate.weight): gates,
                    ("ffn.up", up.weight): ups,
                },
            )
    return None, None, {}


def ends(graph: Walk, output: Node, nodes: set[Node]) -> list[Linear]:
    """The linears nearest above a branch's output, last first."""
    last_nodes = [n for n in graph.climb(output, _TO_OUTPUT).found if n in nodes]
    return [graph.linears[n] for n in sorted(last_nodes, key=graph.order.__getitem__, reverse=True)]


def router(graph: Walk, linear: Linear) -> bool:
    """Whether a linear's outputs are what the choice of experts is made from."""
    seen: set[Node] = set()
    stack = [linear.node]
    while stack:
        for user in users(stack.pop()):
            if is_op(user, TOP):
                return True
            if user not in seen and is_op(user, _TO_CHOICE):
                seen.add(user)
                stack.append(user)
    return False


def mixer(graph: Walk, output: Node, linears: list[Linear], nodes: set[Node]) -> Draft | None:
    """The mixer made of `linears`: those that read the stream, those that write it, the rest."""
    last = [p for p in ends(graph, output, nodes) if p in linears]
    first = [
        p for p in linears
        if not any(o is not p and graph.depends(p.node, o.node) for o in linears)
    ]  # fmt: skip
    last = [p for p in last if p not in first][:1]
    if not first or not last:
        return None
    parts = {
        "mixer.in": first,
        "mixer.inner": [p for p in linears if p not in first and p not in last],
        "mixer.out": last,
    }
    path = graph.between(first[0].node, last[0].node)
    between = [n for n in path[:-1] if n in graph.convs or not graph.passes(n, OUT | FFN_UP)]
    mixing = [n for n in between if n not in graph.linears]
    return Draft("mixer", parts) if mixing else None


def beside(graph: Walk, probe: Probe, draft: Draft, core: Core) -> list[Part]:
    """The roles of features of q, k and v's linears that are none of the three: gates of the
    attention's output, and a feed-forward block that one linear makes together with them."""
    ends = draft.parts["o"]
    claimed: dict[Node, set[int]] = {}
    for role in "qkv":
        for linear in draft.parts[role]:
            own = draft.features.get((role, linear.weight), range(linear.sizes[1]))
            claimed.setdefault(linear.node, set()).update(own)
    partial = [
        graph.linears[n] for n, own in claimed.items()
        if len(own) < graph.linears[n].sizes[1] and graph.linears[n].rows is None
    ]  # fmt: skip
    if not ends or not partial:
        return []
    products = [
        n for n in graph.between(core.node, ends[0].x)
        if is_op(n, MULS) and len([a for a in n.args[:2] if isinstance(a, Node)]) == 2
    ]  # fmt: skip
    gates = [i for n in products for i in inputs(n) if not graph.depends(i, core.node)]
    others: list[Part] = []
    for linear in partial:
        touched = {f for gate in gates for f in probe.features(linear.node, gate)}
        if gating := touched - claimed[linear.node]:
            others.append(("attn.gate", linear, tuple(sorted(gating))))
        if not gating:
            *_, fused = _gated(graph, probe, ends[0].x, {linear.node})
            others += [(role, linear, own) for (role, _), own in fused.items()]
    return others
