"""What every node of a graph needs to have run before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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

    def computed(self, found: Iterable[int]) -> set[int]:
        """Without inputs, outputs and stored tensors."""
        return {i for i in found if self.nodes[i].op not in _NOT_COMPUTED}

    def below(self, start: Iterable[int]) -> set[int]:
        """What needs any of `start`, `start` included."""
        return _reach(start, self.after.__getitem__)

    def above(self, start: Iterable[int]) -> set[int]:
        """What any of `start` needs, `start` included."""
        return _reach(start, self.before.__getitem__)

    def carried(self, start: int) -> set[int]:
        """What needs more of `start` than its size."""
        return _reach(
            [start], lambda i: (j for j in self.after[i] if not is_op(self.nodes[j], SIZES))
        )

    def closed(self, found: set[int]) -> set[int]:
        """`found` and all that is computed on the way from one of it to another."""
        return self.computed(self.below(found) & self.above(found))


def _reach(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> set[int]:
    found = set(start)
    stack = list(found)
    while stack:
        fresh = [j for j in step(stack.pop()) if j not in found]
        found.update(fresh)
        stack += fresh
    return found


def site_nodes(gm: GraphModule) -> dict[str, Node]:
    """Graph nodes by the name that sites use; a lowered call stands for its linear."""
    return {n.meta.get("call", n.name): n for n in gm.graph.nodes}
