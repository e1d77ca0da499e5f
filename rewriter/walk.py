"""Dataflow walks over a canonical graph: linears, attentions, feed-forward blocks, residuals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from .aten import (
    ACTIVATIONS,
    ADDS,
    ARITHMETIC,
    ATEN,
    CASTS,
    DROPOUTS,
    LINEAR,
    MATMULS,
    MULS,
    NORM_PARTS,
    SLICES,
    SOFTMAX,
    VIEWS,
    ancestors,
    attribute,
    inputs,
    is_op,
    overloads,
    parameter_of,
    shape,
    submodule,
    users,
)  # fmt: skip
from .modes import AlphaDropout, Attention, TrainingOnly

_MASKS = overloads("masked_fill", "where", "masked_fill_", "clamp", "clamp_min", "maximum")
_TRANSPOSES = overloads("t", "transpose", "permute", "swapaxes")
_UP = VIEWS | SLICES | ARITHMETIC | NORM_PARTS
_FFN_UP = _UP | ACTIVATIONS
_CORE_UP = CASTS | VIEWS | ARITHMETIC | _MASKS | overloads("tanh")
_O_DOWN = VIEWS | SLICES | MULS | NORM_PARTS | overloads("sigmoid")
_OUT = VIEWS | NORM_PARTS | MULS | SLICES


@dataclass
class Linear:
    node: Node
    x: Node
    weight: str
    bias: str | None
    in_out: bool
    sizes: tuple[int, int]


@dataclass
class Core:
    node: Node
    q: Node
    k: Node
    v: Node
    causal: bool
    fused: bool


@dataclass
class Sublayer:
    kind: str
    last: Linear
    output: Node
    residual: Node
    parallel: bool
    site: int
    stream: str = ""
    layer: int | None = None


@dataclass
class Draft:
    """The linears that play each role of one attention or feed-forward block."""

    kind: str
    parts: dict[str, list[Linear]]
    core: Core | None = None
    activation: str = ""
    cross: bool = False
    sublayer: Sublayer | None = None
    features: dict[str, tuple[int, ...]] = field(default_factory=dict[str, "tuple[int, ...]"])


class Walk:
    """One graph under discovery: node classes and walks that need the module."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.linears = {n: found for n in gm.graph.nodes if (found := self._linear(n))}

    def _linear(self, node: Node) -> Linear | None:
        if is_op(node, LINEAR):
            x, w = node.args[:2]
            b = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            in_out = False
        elif is_op(node, ATEN.addmm.default):
            b, x, w = node.args[:3]
            in_out = True
        elif is_op(node, MATMULS) and not is_op(node, ATEN.baddbmm.default):
            x, w = node.args[:2]
            b, in_out = None, True
        else:
            return None
        found = parameter_of(w)
        if found is None or not isinstance(x, Node):
            return None
        path, steps = found
        held = attribute(self.gm, path)
        if not isinstance(held, nn.Parameter) or held.dim() != 2:
            return None
        if any(is_op(s, SLICES) for s in steps):
            return None
        if sum(is_op(s, _TRANSPOSES) for s in steps) % 2:
            in_out = not in_out
        rows, columns = int(held.shape[0]), int(held.shape[1])
        bias = parameter_of(b)
        sizes = (rows, columns) if in_out else (columns, rows)
        return Linear(node, x, path, bias[0] if bias else None, in_out, sizes)

    def is_dropout(self, node: Node) -> bool:
        return is_op(node, DROPOUTS) or isinstance(
            submodule(self.gm, node), nn.Dropout | AlphaDropout | TrainingOnly
        )

    def producers(self, start: Node, through: frozenset[object]) -> dict[Node, bool]:
        """Nearest linears above `start`: node -> an activation lies between."""
        found: dict[Node, bool] = {}
        seen: set[tuple[Node, bool]] = set()
        stack = [(start, False)]
        while stack:
            node, active = stack.pop()
            if (node, active) in seen:
                continue
            seen.add((node, active))
            if node in self.linears:
                found[node] = found.get(node, False) or active
            elif is_op(node, through) or self.is_dropout(node):
                now = active or is_op(node, ACTIVATIONS)
                stack.extend((i, now) for i in inputs(node))
        return found

    def consumers(self, start: Node, through: frozenset[object]) -> list[Linear]:
        """Nearest linears below `start` that read it as their input."""
        found: list[Linear] = []
        seen: set[Node] = set()
        stack = [start]
        while stack:
            node = stack.pop()
            for user in users(node):
                if user in seen:
                    continue
                seen.add(user)
                if user in self.linears:
                    found.append(self.linears[user])
                elif is_op(user, through) or self.is_dropout(user):
                    stack.append(user)
        order = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        return sorted(found, key=lambda linear: order[linear.node])

    def source(self, node: Node) -> Node:
        """`node` without views and dropout around it."""
        while isinstance(node.args[0] if node.args else None, Node) and (
            is_op(node, VIEWS) or self.is_dropout(node)
        ):
            node = node.args[0]  # pyright: ignore[reportAssignmentType]
        return node

    def cores(self) -> list[Core]:
        found: list[Core] = []
        for node in self.gm.graph.nodes:
            if isinstance(submodule(self.gm, node), Attention):
                q, k, v = node.args[:3]
                causal = bool(node.args[4]) if len(node.args) > 4 else False
                found.append(Core(node, q, k, v, causal, True))
            elif is_op(node, SOFTMAX) and (core := self._eager_core(node)):
                found.append(core)
        return found

    def _eager_core(self, softmax: Node) -> Core | None:
        below = softmax
        product: Node | None = None
        while True:
            following = [
                u for u in users(below)
                if is_op(u, VIEWS) or self.is_dropout(u) or is_op(u, MATMULS)
            ]  # fmt: skip
            product = next((u for u in following if is_op(u, MATMULS)), None)
            if product is not None or not following:
                break
            below = following[0]
        if product is None or not isinstance(product.args[1], Node):
            return None
        stack = inputs(softmax)
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if is_op(node, MATMULS) and node not in self.linears:
                q, k = node.args[-2:] if is_op(node, ATEN.baddbmm.default) else node.args[:2]
                if isinstance(q, Node) and isinstance(k, Node):
                    return Core(product, q, k, product.args[1], False, False)
            elif is_op(node, _CORE_UP):
                stack.extend(inputs(node))
        return None

    def attention(self, core: Core) -> Draft | None:
        parts = {
            role: [self.linears[n] for n in self.producers(start, _UP)]
            for role, start in (("q", core.q), ("k", core.k), ("v", core.v))
        }
        if not all(parts.values()):
            return None
        taken = {id(p) for found in parts.values() for p in found}
        after = [p for p in self.consumers(core.node, _O_DOWN) if id(p) not in taken]
        parts["o"] = after[:1]
        cross = self.source(parts["q"][0].x) is not self.source(parts["k"][0].x)
        return Draft("attn", parts, core=core, cross=cross)

    def feed_forward(self, down: Linear, taken: set[Node]) -> Draft | None:
        found = {n: a for n, a in self.producers(down.x, _FFN_UP).items() if n is not down.node}
        if not found or len(found) > 2 or set(found) & taken or not any(found.values()):
            return None
        linears = {self.linears[n].weight: self.linears[n] for n in found}
        sources = {self.source(p.x) for p in linears.values()}
        if len(sources) != 1 or any(p.sizes[0] != down.sizes[1] for p in linears.values()):
            return None
        gate = [self.linears[n] for n, active in found.items() if active]
        up = [self.linears[n] for n, active in found.items() if not active]
        between = ancestors(down.x, block=lambda n: n in self.linears)
        name = next((str(n.target).split(".")[1] for n in between if is_op(n, ACTIVATIONS)), "")
        parts = {"ffn.up": up or gate, "ffn.gate": gate if up else [], "ffn.down": [down]}
        return Draft("ffn", parts, activation=name)

    def residual(self, last: Linear, finals: set[Node]) -> tuple[Node, Node, bool] | None:
        """(branch output, residual add, parallel) of the sublayer that ends in `last`."""
        seen = {last.node}
        queue = [last.node]
        size = shape(last.node)
        while queue:
            node = queue.pop(0)
            for user in users(node):
                if user in seen:
                    continue
                operands = [a for a in user.args[:2] if isinstance(a, Node)]
                if is_op(user, ADDS) and len(operands) == 2:
                    other = operands[1] if operands[0] is node else operands[0]
                    mine: tuple[Any, ...] = shape(node) or (None,)
                    same = shape(other) == mine and size is not None
                    if same and size and mine[-1] == size[-1] and other.op != "get_attr" and (
                        other not in seen
                    ):  # fmt: skip
                        return self._close(node, user, other, finals)
                if is_op(user, _OUT) or self.is_dropout(user):
                    seen.add(user)
                    queue.append(user)
        return None

    def _close(
        self, branch: Node, add: Node, other: Node, finals: set[Node]
    ) -> tuple[Node, Node, bool]:
        parallel = False
        while self.source(other) in finals:
            parallel = True
            following = [u for u in users(add) if is_op(u, ADDS)]
            if not following:
                break
            outer = following[0]
            operands = [a for a in outer.args[:2] if isinstance(a, Node) and a is not add]
            if not operands:
                break
            add, other = outer, operands[0]
        # The residual may itself hold the other branch: x + a, then (x + a) + m.
        return branch, add, parallel
