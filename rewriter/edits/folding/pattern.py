"""Patterns: a subgraph written as a function, matched with reasons when it does not.

    def lora(op, x, w, b, branch):
        return op.add(op.linear(x, w, b), op.module(Delta, branch, x))

Parameters of the function are variables; a variable met twice must be the same value. A failed
match says why and at which node, which is what reports show.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ...graph.aten import ADDS, is_op, submodule, users
from ...graph.weighted_call import WeightedCall


@dataclass(frozen=True)
class Variable:
    """Binds whatever stands at its place."""

    name: str


@dataclass(frozen=True)
class Term:
    """An operation in a pattern: `linear`, `add` or `module`."""

    kind: str
    args: tuple[Variable | Term, ...]
    module: type[nn.Module] | None = None
    name: str = ""


class Ops:
    """What patterns are written with."""

    def linear(self, x: Any, weight: Any, bias: Any) -> Term:
        """A call of a weight in any spelling; `bias` binds None where there is none."""
        return Term("linear", (x, weight, bias))

    def add(self, a: Any, b: Any) -> Term:
        """A sum of two tensors, in either order."""
        return Term("add", (a, b))

    def module(self, kind: type[nn.Module], name: Variable, *args: Any) -> Term:
        """A call of a module of class `kind`; `name` binds the calling node."""
        return Term("module", args, kind, name.name)


@dataclass(frozen=True)
class Match:
    """A subgraph that fits: its root, variable bindings, and the inner nodes it covers."""

    root: Node
    bound: dict[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


@dataclass(frozen=True)
class Mismatch:
    """Why a pattern does not fit, and at which node."""

    reason: str
    node: Node | None


class Pattern:
    """A pattern compiled from a function."""

    def __init__(self, function: Callable[..., Term]) -> None:
        names = list(inspect.signature(function).parameters)[1:]
        self.name = function.__name__
        self.term = function(Ops(), *(Variable(n) for n in names))

    def match(self, gm: GraphModule, root: Node) -> Match | Mismatch:
        """Matches with `root` as the last node of the subgraph."""
        state = _State(gm, {}, [])
        failure = state.term(self.term, root)
        if failure is not None:
            return failure
        for node in state.nodes:
            if node is not root and any(u not in state.nodes for u in users(node)):
                outside = next(u for u in users(node) if u not in state.nodes)
                return Mismatch(f"{node.name} is also read by {outside.name}", node)
        return Match(root, state.bound, tuple(state.nodes))

    def matches(self, gm: GraphModule) -> Iterator[Match]:
        """All matches in the graph, roots in graph order."""
        for node in list(gm.graph.nodes):
            match = self.match(gm, node)
            if isinstance(match, Match):
                yield match


def pattern(function: Callable[..., Term]) -> Pattern:
    """Turns a function of (op, variables...) into a Pattern."""
    return Pattern(function)


@dataclass
class _State:
    gm: GraphModule
    bound: dict[str, Any]
    nodes: list[Node]

    def bind(self, name: str, item: Any) -> Mismatch | None:
        if name in self.bound and self.bound[name] is not item:
            return Mismatch(f"{name} is not the same value everywhere", _node(item))
        self.bound[name] = item
        return None

    def item(self, want: Variable | Term, got: Any) -> Mismatch | None:
        if isinstance(want, Variable):
            return self.bind(want.name, got)
        if not isinstance(got, Node):
            return Mismatch(f"{want.kind} expected, found {got!r}", None)
        return self.term(want, got)

    def term(self, want: Term, node: Node) -> Mismatch | None:
        if want.kind == "linear":
            call = WeightedCall.of(node)
            if call is None:
                return Mismatch("not a linear", node)
            self.nodes.append(node)
            return self.all(want.args, (call.x, call.weight, call.bias))
        if want.kind == "module":
            module = submodule(self.gm, node)
            if want.module is None or not isinstance(module, want.module):
                return Mismatch(f"not a call of {want.module and want.module.__name__}", node)
            self.nodes.append(node)
            return self.bind(want.name, node) or self.all(want.args, node.args)
        if not is_op(node, ADDS) or node.kwargs:
            return Mismatch("not a sum", node)
        saved = dict(self.bound), list(self.nodes)
        self.nodes.append(node)
        failure = self.all(want.args, node.args[:2])
        if failure is None:
            return None
        self.bound, self.nodes = saved
        self.nodes.append(node)
        return self.all(want.args, node.args[1::-1]) and failure

    def all(self, wants: tuple[Variable | Term, ...], gots: Any) -> Mismatch | None:
        if len(wants) != len(gots):
            return Mismatch(f"{len(gots)} operands, {len(wants)} expected", None)
        for want, got in zip(wants, gots, strict=True):
            failure = self.item(want, got)
            if failure is not None:
                return failure
        return None


def _node(item: Any) -> Node | None:
    return item if isinstance(item, Node) else None
