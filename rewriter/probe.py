"""Which output features of a fused projection reach q, k or v: found by differentiation.

Slices, rotary halves and head-interleaved layouts make the path unreadable; the gradient is not:
a feature belongs to the query exactly if the query changes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from .aten import ancestors, inputs


class _Probe(Interpreter):
    """Runs the graph, cutting the gradient at `leaves` and keeping the values of `watched`.

    A graph without storage runs on meta, but for what lies between leaves and watched values:
    there every tensor is real and random, which shows dependence just as well.
    """

    def __init__(self, gm: GraphModule, leaves: set[str], watched: set[str]) -> None:
        super().__init__(gm)
        self.leaves, self.watched = leaves, watched
        self.values: dict[str, Tensor] = {}
        hollow = any(p.is_meta for p in gm.parameters())
        self.between = _between(gm, leaves, watched) if hollow else None

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        fetched = super().fetch_args_kwargs_from_env(n)
        if self.between is None:
            return fetched
        return map_aggregate(fetched, _real if n in self.between else _hollow)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.leaves:
            result = result if self.between is None else _real(result)
            result = result.detach().requires_grad_()
        if n.name in self.leaves or n.name in self.watched:
            self.values[n.name] = result
        return result


def _between(gm: GraphModule, leaves: set[str], watched: set[str]) -> set[Node]:
    """Nodes through which a leaf reaches a watched value, without another leaf between."""
    above: set[Node] = set()
    for node in gm.graph.nodes:
        if node.name in watched:
            above |= set(ancestors(node, block=lambda n: n.name in leaves))
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node in above and any(i.name in leaves or i in found for i in inputs(node)):
            found.add(node)
    return found


def _real(arg: Any) -> Any:
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    if not isinstance(arg, Tensor) or not arg.is_meta:
        return arg
    if arg.is_floating_point():
        return torch.rand(arg.shape, generator=torch.Generator().manual_seed(0)).to(arg.dtype) + 0.5
    return torch.zeros(arg.shape, dtype=arg.dtype)


def _hollow(arg: Any) -> Any:
    return arg.to("meta") if isinstance(arg, Tensor) else arg


def feature_sets(
    gm: GraphModule, sample: Mapping[str, Tensor], pairs: Sequence[tuple[Node, Node]]
) -> list[tuple[int, ...]]:
    """For each (linear, operand): the linear's output features that the operand depends on.

    Returns one tuple of feature indices per pair, in ascending order.
    """
    if not pairs:
        return []
    probe = _Probe(gm, {a.name for a, _ in pairs}, {b.name for _, b in pairs})
    order = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    training = gm.training
    gm.eval()
    try:
        with torch.enable_grad():
            probe.run(*(sample[name] for name in order), enable_io_processing=False)
    finally:
        gm.train(training)
    found: list[tuple[int, ...]] = []
    for linear, operand in pairs:
        leaf, target = probe.values[linear.name], probe.values[operand.name]
        weights = torch.linspace(0.5, 1.5, target.numel()).view(target.shape).to(target)
        (grad,) = torch.autograd.grad((target * weights).sum(), leaf, retain_graph=True)
        touched = grad.flatten(0, -2).abs().sum(0) > 0
        found.append(tuple(int(i) for i in touched.nonzero().flatten()))
    return found
