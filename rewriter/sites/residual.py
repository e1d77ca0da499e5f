"""Residual structure: sums that carry a stream on, the branches that they add, and layers.

In `x + f(x)` the stream is the summand that the other one is computed from, and the branch is
everything between. Sums of sums are one (`x + attn(x) + ffn(x)`, in any order), so that parallel
blocks come out like sequential ones. Chains of such sums are streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..graph.aten import (
    ACTIVATIONS,
    ADDS,
    MULS,
    NORM_PARTS,
    NORMS,
    SLICES,
    VIEWS,
    inputs,
    is_op,
    overloads,
    shape,
    users,
)
from .walk import Walk

_MOVES = overloads("permute", "transpose", "swapaxes")
CARRIES = VIEWS | NORM_PARTS | MULS | ADDS | ACTIVATIONS


@dataclass
class ResidualBranch:
    """One summand beside the stream.

    Attributes:
        root: the stream's value that the branch starts from.
        output: the summand, after everything that is done to it before the sum.
        add: the sum whose value is the stream after the branch.
        nodes: all nodes from root (without it) to output, in graph order.
        group: summands that were added up before they met the stream share a group.
    """

    root: Node
    output: Node
    add: Node
    nodes: list[Node]
    group: Node


@dataclass
class Residual:
    """A sum that carries a stream on: `stream` is the summand that holds it so far."""

    add: Node
    stream: Node
    branches: list[ResidualBranch]


@dataclass
class Sublayer:
    """A branch with a known kind: `attn`, `cross`, `ffn`, `mixer` or `conv`."""

    kind: str
    branch: ResidualBranch
    parallel: bool
    output: Node
    stream: str = ""
    layer: int | None = None
    name: str = ""


@dataclass
class _Term:
    node: Node
    group: Node


def residuals(graph: Walk) -> Iterator[Residual]:
    """All residual sums, in graph order."""
    for node in graph.nodes:
        if graph.summands(node) is None or _absorbed(graph, node):
            continue
        terms = list(_terms(graph, node))
        terms_of = _split(graph, node, terms) or _shortcut(graph, node, terms)
        if terms_of is not None:
            yield terms_of


def _only_user(node: Node) -> Node | None:
    following = users(node)
    return following[0] if len(following) == 1 else None


def _absorbed(graph: Walk, node: Node) -> bool:
    """Whether a sum is only a summand of another one."""
    user = _only_user(node)
    while user is not None and (is_op(user, VIEWS) or graph.is_dropout(user)):
        user = _only_user(user)
    return user is not None and graph.summands(user) is not None


def _terms(graph: Walk, node: Node) -> Iterator[_Term]:
    """The summands of a sum, through inner sums that nothing else reads."""
    for operand in graph.summands(node) or ():
        inner = operand
        while _only_user(inner) is not None and (is_op(inner, VIEWS) or graph.is_dropout(inner)):
            inner = inputs(inner)[0]
        if graph.summands(inner) is not None and _only_user(inner) is not None:
            for term in _terms(graph, inner):
                yield _Term(term.node, operand)
        else:
            yield _Term(operand, operand)


def _root(graph: Walk, node: Node) -> Node:
    """The value behind views and constant scales of a summand."""
    while True:
        if (is_op(node, VIEWS) or graph.is_dropout(node)) and isinstance(node.args[0], Node):
            node = node.args[0]
        elif is_op(node, MULS) and len(inputs(node)) == 1:
            node = inputs(node)[0]
        else:
            return node


def _split(graph: Walk, add: Node, terms: list[_Term]) -> Residual | None:
    for stream in terms:
        for root in dict.fromkeys((stream.node, _root(graph, stream.node))):
            branches = [
                ResidualBranch(root, t.node, add, nodes, t.group)
                for t in terms
                if t is not stream
                and graph.depends(t.node, root)
                and any(map(graph.weighted, nodes := graph.between(root, t.node)))
            ]
            if branches:
                return Residual(add, stream.node, branches)
    return None


def _shortcut(graph: Walk, add: Node, terms: list[_Term]) -> Residual | None:
    """A residual whose stream is projected: one convolution beside a deeper branch."""
    if len(terms) != 2:
        return None
    for stream, other in (terms, terms[::-1]):
        node = stream.node
        while is_op(node, VIEWS | NORMS) or graph.is_batch_norm(node):
            node = inputs(node)[0]
        if node not in graph.convs:
            continue
        root = _root(graph, inputs(node)[0])
        nodes = graph.between(root, other.node) if graph.depends(other.node, root) else []
        if sum(n in graph.convs for n in nodes) > 1 and node not in nodes:
            return Residual(
                add, stream.node, [ResidualBranch(root, other.node, add, nodes, other.node)]
            )
    return None


@dataclass
class Streams:
    """Which chain every residual sum belongs to."""

    graph: Walk
    of: dict[Node, str] = field(default_factory=dict[Node, str])

    def place(self, residual: Residual) -> str:
        """The stream of a sum: that of the nearest sum that its stream operand comes from."""
        layer_above = self.above(residual.stream)
        self.of[residual.add] = layer_above or f"s{len(set(self.of.values()))}"
        return self.of[residual.add]

    def above(self, value: Node) -> str | None:
        """The stream of the nearest sum that carries a value, None if there is none."""
        seen: set[Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.of:
                return self.of[node]
            if self.graph.passes(node, CARRIES | SLICES):
                stack.extend(i for i in inputs(node) if i.op != "get_attr")
        return None


def number(graph: Walk, sublayers: list[Sublayer]) -> None:
    """Gives every sublayer its stream's name, its layer and its own name.

    A layer is the ordinal of a block in its stream. Blocks repeat: the shortest period of the
    kinds in a stream is one block. Where they do not repeat, a block starts at what mixes
    tokens, or at a kind that the block has already.
    """
    streams: dict[str, list[Sublayer]] = {}
    for sub in sorted(sublayers, key=lambda s: (graph.order[s.branch.add], graph.order[s.output])):
        streams.setdefault(sub.stream, []).append(sub)
    taken: dict[str, int] = {}
    for index, members in enumerate(streams.values()):
        blocks = [s for s in members if s.kind != "conv"] or members
        for sub, layer in zip(blocks, _ordinals(blocks), strict=True):
            sub.layer = layer
        latest = 0
        for sub in members:
            latest = sub.layer if sub.layer is not None else latest
            sub.layer, sub.stream = latest, f"s{index}"
            name = f"{sub.stream}.layer{sub.layer}.{sub.kind}"
            count = taken[name] = taken.get(name, 0) + 1
            sub.name = name if count == 1 else f"{name}_{count}"


def _ordinals(members: list[Sublayer]) -> list[int]:
    kinds = [("mix" if s.kind in ("attn", "mixer") else s.kind) + _width(s) for s in members]
    count = len(kinds)
    for period in range(1, count + 1):
        repeats = count % period == 0 and kinds == kinds[:period] * (count // period)
        if repeats and (period < count or len(set(kinds)) == count):
            return [i // period for i in range(count)]
    layer, seen = -1, set[str]()
    ordinals: list[int] = []
    for kind, sub in zip(kinds, members, strict=True):
        if layer < 0 or kind in seen or (kind.startswith("mix") and seen and not sub.parallel):
            layer, seen = layer + 1, set()
        seen.add(kind)
        ordinals.append(layer)
    return ordinals


def _width(sub: Sublayer) -> str:
    """Tells a feed-forward over tokens from one over channels (MLP-Mixer)."""
    size = shape(sub.output)
    return str(size[-1]) if size and sub.kind == "ffn" else ""


def channels_last(branch: ResidualBranch) -> Node:
    """The branch's output where its channels are the last axis: before views that move it."""
    output = node = branch.output
    while is_op(node, VIEWS) and len(users(node)) == 1 and isinstance(node.args[0], Node):
        before, after = node.args[0], shape(node)
        if is_op(node, _MOVES) and after is not None and _moves_last(node, len(after)):
            output = before
        node = before
    return output


def _moves_last(node: Node, rank: int) -> bool:
    """Whether a permutation puts another axis last."""
    axes: list[Any] = list(node.args[1:])
    if len(axes) == 1 and isinstance(axes[0], list | tuple):
        return int(axes[0][-1]) % rank != rank - 1
    return any(isinstance(a, int) and a % rank == rank - 1 for a in axes)
