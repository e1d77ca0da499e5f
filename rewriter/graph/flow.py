"""What every node of a graph needs to have run before it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable

from torch.fx import GraphModule, Node

from .aten import SIZES, inputs, is_op, written

_NOT_COMPUTED = ("placeholder", "get_attr", "output")


class Flow:
    """The nodes by graph position, and how they depend on each other, in-place writes included."""

    def __init__(self, gm: GraphModule) -> None:
        self.nodes: list[Node] = list(gm.graph.nodes)
        self.index = {n: i for i, n in enumerate(self.nodes)}
        self.before: list[set[int]] = [set() for _ in self.nodes]
        self.after: list[set[int]] = [set() for _ in self.nodes]
        writers: dict[Node, list[int]] = {}
        for i, node in enumerate(self.nodes):
            target = written(node)
            needed = [self.index[s] for s in inputs(node)]
            for source in (*inputs(node), *([target] if target else ())):
                needed += writers.get(source, ())
            if target is not None:
                needed += [self.index[r] for r in target.users if self.index[r] < i]
                writers.setdefault(target, []).append(i)
            for j in set(needed):
                self.before[i].add(j)
                self.after[j].add(i)

    def computed(self, nodes: Iterable[int]) -> set[int]:
        """Without inputs, outputs and stored tensors."""
        return {i for i in nodes if self.nodes[i].op not in _NOT_COMPUTED}

    @functools.cached_property
    def needs(self) -> list[int]:
        """By node, the places of all that it needs, itself included, as bits of a number."""
        masks: list[int] = []
        for i, before in enumerate(self.before):
            masks.append(functools.reduce(operator.or_, (masks[j] for j in before), 1 << i))
        return masks

    def above(self, ends: Iterable[int]) -> int:
        """What any of `ends` needs, `ends` included, as bits."""
        return functools.reduce(operator.or_, (self.needs[i] for i in ends), 0)

    def below(self, start: Iterable[int], ends: Iterable[int] | None = None) -> set[int]:
        """What needs any of `start`, `start` included; as far as any of `ends` needs it."""
        above = -1 if ends is None else self.above(ends)
        first = {i for i in start if above >> i & 1}
        return _reach(first, lambda i: (j for j in self.after[i] if above >> j & 1))

    def carried(self, start: int, end: int) -> set[int]:
        """What needs more of `start` than its size, as far as `end` needs it."""
        above = self.above([end])

        def step(i: int) -> Iterable[int]:
            fitting = (j for j in self.after[i] if above >> j & 1)
            return (j for j in fitting if not is_op(self.nodes[j], SIZES))

        return _reach({start}, step)

    def closed(self, nodes: Collection[int]) -> set[int]:
        """`nodes` and all that is computed on the way from one of it to another."""
        return self.computed(self.below(nodes, nodes))


def _reach(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> set[int]:
    reached = set(start)
    stack = list(reached)
    while stack:
        fresh = [j for j in step(stack.pop()) if j not in reached]
        reached.update(fresh)
        stack += fresh
    return reached


def site_nodes(gm: GraphModule) -> dict[str, Node]:
    """Graph nodes by the name that sites use; a lowered call stands for its linear."""
    return {n.meta.get("call", n.name): n for n in gm.graph.nodes}
