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


class _Probe(Interpreter):
    """Runs the graph, cutting the gradient at `leaves` and keeping the values of `watched`."""

    def __init__(self, gm: GraphModule, leaves: set[str], watched: set[str]) -> None:
        super().__init__(gm)
        self.leaves, self.watched = leaves, watched
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.leaves:
            result = result.detach().requires_grad_()
        if n.name in self.leaves or n.name in self.watched:
            self.values[n.name] = result
        return result


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
