"""Facts about a canonical graph that discovery stands on: linears, convolutions, dependence.

A *linear* is a call whose weight is a stored matrix, or a stack of them (experts). Dependence
leaves out sizes (a view by another tensor's size is no dataflow) and follows in-place writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ..graph.aten import (
    ACTIVATIONS,
    ADDS,
    ARITHMETIC,
    ATEN,
    CONVS,
    DROPOUTS,
    LINEAR,
    MATMULS,
    MULS,
    NORM_PARTS,
    POINTWISE,
    SIZES,
    SLICES,
    TRANSPOSED_CONVS,
    VIEWS,
    inputs,
    is_index,
    is_op,
    named_arguments,
    overloads,
    parameter_of,
    shape,
    submodule,
    users,
    written,
)  # fmt: skip
from ..graph.modes import AlphaDropout, BatchNorm, TrainingOnly
from ..graph.weighted_call import is_grouped
from .products import matrix

UP = VIEWS | SLICES | ARITHMETIC | NORM_PARTS | overloads("index", "index_select")
"""What lies between a projection and the attention that reads it: layout, rotation, norms."""
FFN_UP = UP | ACTIVATIONS | POINTWISE
OUT = VIEWS | NORM_PARTS | MULS | SLICES


@dataclass
class Linear:
    """One call of a weight matrix.

    Attributes:
        in_out: the weight is stored `[in, out]`.
        sizes: (in, out) features.
        stack: number of matrices in a stack of experts, 0 for a plain weight.
        left: the weight is the left operand, `W @ x`: features are the last axis but one.
        rows: the output features of the weight that the call uses, None for all.
        place: the axis of the experts in a stack.
    """

    node: Node
    x: Node
    weight: str
    bias: str | None
    in_out: bool
    sizes: tuple[int, int]
    stack: int = 0
    left: bool = False
    rows: tuple[int, ...] | None = None
    place: int = 0


@dataclass
class Conv:
    """One convolution; `weight` is '' where it is not a stored parameter."""

    node: Node
    weight: str
    bias: str | None
    channels: tuple[int, int]
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    transposed: bool

    @property
    def depthwise(self) -> bool:
        """Whether every channel is filtered by itself."""
        return self.groups > 1 and self.groups == self.channels[0]


@dataclass
class Climb:
    """What a walk upwards met: linears (with an activation on the way or not), and dead ends."""

    found: dict[Node, bool] = field(default_factory=dict[Node, bool])
    stopped: set[Node] = field(default_factory=set[Node])


class Walk:
    """One graph under discovery: node classes, dependence, and walks."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.writers: dict[Node, list[Node]] = {}
        for node in self.nodes:
            target = written(node)
            if target is not None and not node.users:
                self.writers.setdefault(target, []).append(node)
        self.linears = {n: linear for n in self.nodes if (linear := self._linear(n))}
        self.convs = {n: linear for n in self.nodes if (linear := self._conv(n))}
        self._above: list[int] = []
        for index, node in enumerate(self.nodes):
            bits = 0
            if not is_op(node, SIZES) and node.op != "get_attr":
                bits = 1 << index
                for source in inputs(node):
                    bits |= self._above[self.order[source]]
                    for writer in self.writers.get(source, ()):
                        if self.order[writer] < index:
                            bits |= self._above[self.order[writer]]
            self._above.append(bits)

    def depends(self, node: Node, source: Node) -> bool:
        """Whether `node` is computed from `source` (or is it)."""
        return bool(self._above[self.order[node]] >> self.order[source] & 1)

    def depends_on_any(self, node: Node, sources: Iterable[Node]) -> bool:
        """Whether `node` is computed from one of `sources`."""
        return any(self.depends(node, source) for source in sources)

    def between(self, top: Node, bottom: Node) -> list[Node]:
        """The nodes computed from `top` that `bottom` is computed from, `bottom` included."""
        first, last = self.order[top], self.order[bottom]
        bits, above = 1 << first, self._above
        wanted = above[last]
        return [
            self.nodes[i] for i in range(first + 1, last + 1) if wanted >> i & 1 and above[i] & bits
        ]

    # Node classes.

    def _linear(self, node: Node) -> Linear | None:
        left = False
        bias: object = None
        if is_op(node, LINEAR):
            x, w = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            in_out = False
        elif is_op(node, ATEN.addmm.default):
            bias, x, w = node.args[:3]
            in_out = True
        elif (is_op(node, MATMULS) and not is_op(node, ATEN.baddbmm.default)) or is_grouped(node):
            x, w = node.args[:2]
            in_out = True
            if matrix(self.gm, w) is None and matrix(self.gm, x) is not None:
                x, w, left, in_out = w, x, True, False
        else:
            return None
        stored = matrix(self.gm, w)
        if stored is None or not isinstance(x, Node):
            return None
        in_out, rows, tensor = in_out != stored.turned, stored.rows, stored.held
        height, width = stored.sizes
        if in_out and rows is not None:
            return None
        named = parameter_of(bias)
        sizes = (height, width) if in_out else (width, len(rows) if rows else height)
        stack = int(tensor.shape[stored.place]) if tensor.dim() == 3 else 0
        name = named[0] if named else None
        place = stored.place
        return Linear(node, x, stored.path, name, in_out, sizes, stack, left, rows, place)

    def _conv(self, node: Node) -> Conv | None:
        if not is_op(node, CONVS):
            return None
        weight, bias = parameter_of(node.args[1]), None
        kernel: tuple[Any, ...] = shape(node.args[1]) or (0, 0)
        if len(node.args) > 2:
            bias = parameter_of(node.args[2])
        transposed = is_op(node, TRANSPOSED_CONVS)
        given = named_arguments(node)
        groups = given.get("groups", 1)
        stride = given.get("stride", 1)
        count = groups if isinstance(groups, int) else 1
        steps = tuple(stride) if isinstance(stride, list | tuple) else (stride,)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        first, second = int(kernel[0]), int(kernel[1])
        channels = (first, second * count) if transposed else (second * count, first)
        sizes = tuple(int(k) for k in kernel[2:])
        strides = tuple(int(s) for s in steps if isinstance(s, int)) or (1,)
        if len(strides) < len(sizes):
            strides = strides * len(sizes)
        return Conv(node, weight[0] if weight else "", bias[0] if bias else None, channels,
                    count, sizes, strides, transposed)  # fmt: skip

    def is_dropout(self, node: Node) -> bool:
        """Whether a node drops values in training only."""
        return is_op(node, DROPOUTS) or isinstance(
            submodule(self.gm, node), nn.Dropout | AlphaDropout | TrainingOnly
        )

    def is_batch_norm(self, node: Node) -> bool:
        """Whether a node is a batch norm with its train/eval switch."""
        return isinstance(submodule(self.gm, node), BatchNorm)

    def passes(self, node: Node, through: frozenset[object]) -> bool:
        """Whether a walk through `through` goes on at `node`."""
        return is_op(node, through) or self.is_dropout(node) or self.is_batch_norm(node)

    def weighted(self, node: Node) -> bool:
        """Whether a node is a linear or a convolution."""
        return node in self.linears or node in self.convs

    # Walks.

    def climb(self, start: Node, through: frozenset[object]) -> Climb:
        """Walks up from `start`: the nearest linears, and where the walk cannot go on."""
        result = Climb()
        seen: set[tuple[Node, bool]] = set()
        stack = [(start, False)]
        while stack:
            node, active = stack.pop()
            if (node, active) in seen:
                continue
            seen.add((node, active))
            conv = self.convs.get(node)
            if node in self.linears:
                result.found[node] = result.found.get(node, False) or active
            elif node in self.writers:
                stack.extend((w, active) for w in self.writers[node])
            elif written(node) is not None and not node.users:
                stack.extend((i, active) for i in inputs(node)[1:] if not is_index(i))
            elif self.passes(node, through) or (conv and conv.depthwise):
                now = active or is_op(node, ACTIVATIONS)
                stack.extend((i, now) for i in inputs(node) if not is_index(i))
            elif node.op not in ("get_attr", "placeholder"):
                result.stopped.add(node)
        return result

    def consumers(self, start: Node, through: frozenset[object]) -> list[Linear]:
        """Nearest linears below `start` that read it as their input."""
        linears: list[Linear] = []
        seen: set[Node] = set()
        stack = [start]
        while stack:
            node = stack.pop()
            for user in users(node):
                if user in seen:
                    continue
                seen.add(user)
                if user in self.linears:
                    linears.append(self.linears[user])
                elif is_op(user, through) or self.is_dropout(user):
                    stack.append(user)
        return sorted(linears, key=lambda linear: self.order[linear.node])

    def source(self, node: Node) -> Node:
        """`node` without views and dropout around it."""
        while isinstance(node.args[0] if node.args else None, Node) and (
            is_op(node, VIEWS) or self.is_dropout(node)
        ):
            node = node.args[0]  # pyright: ignore[reportAssignmentType]
        return node

    def summands(self, node: Node) -> tuple[Node, Node] | None:
        """The two tensors that a node adds, None if it is no such sum."""
        two = [a for a in node.args[:2] if isinstance(a, Node) and shape(a) is not None]
        if not is_op(node, ADDS) or len(two) != 2 or any(a.op == "get_attr" for a in two):
            return None
        return two[0], two[1]
