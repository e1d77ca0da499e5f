"""Diff pruning: `theta = theta_0 + z w`, with w learnt and z driven to zero almost everywhere.

Guo et al., ACL 2021, arXiv:2012.07463. Three stages:

1.  z are random hard-concrete gates (`kernels/hard_concrete.py`), and `l0 sum P(z > 0)` is added
    to the loss. Structured: z = z_entry z_group, and P(z > 0) is the product; groups are stored
    tensors (the paper's), layers (an option of the released code), or the rows, columns or
    feed-forward neurons of matrices. w starts at zero, so step 0 is the base model. Evaluation,
    folding and export take the gates without noise.
2.  `bake` keeps exactly the share `density` of all entries, those with the largest |z w|. Tensors
    that keep none lose their expression.
3.  The values at these places train on: a vector as long as what trains, so that an optimiser
    holds two numbers an entry and no weight decay reaches a frozen one. An artifact holds one
    int32 index and one value an entry.

    program = peftfx.run(program, "diff_pruning")                       # train with its controllers
    program = peftfx.run(program, peftfx.controllers(program).finish())             # train again

Memory, in units of the selected tensors: stage 1 holds theta_0, w, alpha, two gradients and four
moments of AdamW, 9 (full fine-tuning: 4), and keeps 4 or, structured, 5 more from forward to
backward. Stage 3 holds theta_0 and keeps the computed weight, 2, and one gradient at a time, or
after `lower` neither. Folds exactly at each stage. A tied tensor is one tensor: all its readers
see the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.linear.sparse import parts_of
from ...rewriter.measure.constants import constant_reads
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.scores.entries import keep_largest
from ..merging.bake import Bake
from .gates import GatedDelta, Gates, SharedGates


class GateController(Controller):
    """The L0 penalty, and the gates' own learning rate."""

    def gated(self) -> dict[str, GatedDelta]:
        """The branches that are not settled yet, by path."""
        return {p: b for p, b in self.branches() if isinstance(b, GatedDelta)}

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        if name.endswith((".alpha", ".group")):
            return {"lr_scale": cast(DiffPruning, self.method).alpha_lr, "weight_decay": 0.0}
        return super().group(name, parameter)

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        method, gated = cast(DiffPruning, self.method), self.gated().values()
        if not gated or not method.l0:
            return None
        modules = {b.shared: self.program.module.get_submodule(b.shared) for b in gated if b.shared}
        shared = {p: m.open() for p, m in modules.items() if isinstance(m, SharedGates)}
        terms = [b.expected(method.compat, shared.get(b.shared)) for b in gated]
        if method.compat:
            terms += [gates.sum() for gates in shared.values()]
        return method.l0 * torch.stack(terms).sum()

    def finish(self) -> tuple[Pass, ...]:
        return (Bake(names=(self.adapter,)),) if self.gated() else ()


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """Trains a sparse difference of the selected stored tensors.

    Attributes:
        density: share of all selected entries that `bake` keeps.
        structured: with gates of groups of entries beside those of entries.
        groups: what has one: each `tensor`, `layer`, `row` (of one output's weights), `column` (of
            one input's) or `neuron` (its row before and its column behind the activation). Vectors
            and, for layers and neurons, what stands outside have one a tensor.
        l0: weight of the penalty.
        alpha: where gates start; 5 is open.
        alpha_lr: learning rate of the gates, relative to that of w.
        low, high: the gates' stretch.
        bias: also the biases of linears, convolutions and norms.
        compat: as released, groups add a penalty of their own instead of multiplying.
        where: linears, experts, convolutions, norms or embeddings.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "conv", "norm", "embedding")
    controller: ClassVar[type[Controller]] = GateController
    folds: ClassVar[str] = "exactly"

    density: float = 0.005
    structured: bool = True
    groups: Literal["tensor", "layer", "row", "column", "neuron"] = "tensor"
    l0: float = 1.25e-7
    alpha: float = 5.0
    alpha_lr: float = 1e4
    low: float = -1.5
    high: float = 1.5
    bias: bool = True
    compat: bool = False
    where: str = "linear and not head|conv|experts"

    @property
    def stretch(self) -> tuple[float, float]:
        return self.low, self.high

    def check(self) -> None:
        self.require(0 < self.density <= 1, "density", "in (0, 1]")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(0 <= self.l0 < math.inf, "l0", "at least 0")
        self.require(0 < self.alpha_lr < math.inf, "alpha_lr", "positive")
        self.require(-math.inf < self.low < 0, "low", "below 0")
        self.require(1 < self.high < math.inf, "high", "above 1")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        decided = super().plan(program, data, sources).decisions
        parts, left = parts_of(program, self.sites(program), self.bias)
        tensors, reasons = [p.name for p in parts], [[s.id, why] for s, why in left]
        return Plan({**decided, "tensors": tensors, "left": reasons})

    def insert_all(self, edit: Editor, sites: Sequence[Site], plan: Plan) -> None:
        parts = [p for p in parts_of(edit.program, sites, self.bias)[0]
                 if p.name in plan.decisions["tensors"]]  # fmt: skip
        make = Gates(edit, parts, self.groups if self.structured else "", self.alpha, self.stretch)
        for part in parts:
            branch, reads = make.branch(part)
            edit.express(part.site, part.name, branch, **reads)
            edit.edited.extend(site.id for site in part.sites)
        edit.skipped.extend((site, why) for site, why in plan.decisions["left"])

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        gated = GateController(program, self).gated()
        reads = constant_reads(program, [a for a in program.attachments if a.path in gated])
        return keep_largest(gated, self.density, reads)
