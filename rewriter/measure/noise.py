"""Outputs that are nothing but rounding: what is left where larger numbers cancel.

A difference of such an output says nothing relative to its own largest value; it is measured
against the numbers that it is made of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from ..graph.aten import ancestors, output_node, placeholders
from ..graph.module import CapturedModule
from ..program.sites import LinearSite
from .witness import Witness

ROUNDINGS = 8
"""Roundings of the largest number behind an output: what is below them may be cancellation."""


def levels(witness: Witness, inputs: Mapping[str, Tensor]) -> list[float]:
    """By output, the largest value that a linear behind it gives; 0 where there is none."""
    gm = witness.gm
    names = {n for s in witness.program.sites if isinstance(s, LinearSite) for n in s.nodes}
    given = witness.completed(inputs)
    run = _Sizes(gm, {n for n in gm.graph.nodes if n.name in names})
    witness.reset()
    with torch.no_grad():
        run.run(*(given[n].clone() for n in placeholders(gm)), enable_io_processing=False)
    leaves = pytree.tree_leaves(output_node(gm).args[0])
    return [
        max((run.sizes.get(n, 0.0) for n in ancestors(leaf)), default=0.0)
        if isinstance(leaf, Node) else 0.0
        for leaf in leaves
    ]  # fmt: skip


def cancelled(witness: Witness, largest: float, level: float) -> bool:
    """Whether an output with that largest value may be what cancellation leaves of `level`."""
    dtypes = {p.dtype for p in witness.gm.parameters() if p.is_floating_point()}
    eps = max((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float32).eps)
    return largest <= ROUNDINGS * eps * level


class _Sizes(Interpreter):
    """The largest finite value of some nodes."""

    def __init__(self, gm: CapturedModule, nodes: Collection[Node]) -> None:
        super().__init__(gm)
        self.nodes = nodes
        self.sizes: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes and isinstance(result, Tensor) and result.is_floating_point():
            finite = result[result.isfinite()]
            self.sizes[n] = float(finite.abs().max()) if finite.numel() else 0.0
        return result
