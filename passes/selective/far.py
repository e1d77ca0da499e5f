"""FAR: train some neurons of each feed-forward block, chosen by how far priming moves them.

Vucetic et al., ISCAS 2022, arXiv:2205.01541. A neuron is its row of the first matrix (and of a
gate's), its entry of their biases, and its column of the last matrix. Two stages:

1.  Priming: the blocks train whole, for a small share of the steps.
2.  `bake` keeps the share `share` of neurons whose rows moved most (L1 norm); what they learnt
    stays, and the others are the base's again. From here on the learners are dense parts of their
    own, `[n, in]` and `[out, n]`, and nothing else has gradients or moments. After `lower`,
    backward computes no others: as much as with matrices split in two, which need not be permuted.

    program = peftfx.run(program, "far")                                # prime with its controllers
    program = peftfx.run(program, [*peftfx.controllers(program).finish(), "lower"])   # train again

`scope` and `metric` are readings that the paper leaves open. Biases and norms elsewhere train with
`bitfit` beside it. What trains is the difference from the base, so weight decay draws to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.linear.sparse import (
    Part,
    parts_of,
)
from ...rewriter.errors import MetaTensorError
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import FeedForwardSite
from ...rewriter.program.state import State
from ...rewriter.scores.allocate import largest
from ..merging.bake import Bake
from .neurons import Neurons, PrimedDelta, neurons_of

Primed = Mapping[str, tuple[str, PrimedDelta]]


class Priming(Controller):
    """Ends with the choice of the learners."""

    def primed(self) -> Primed:
        """The branches that are not settled yet, with their paths, by the name of their tensor."""
        return {b.piece.name: (p, b) for p, b in self.branches() if isinstance(b, PrimedDelta)}

    def finish(self) -> tuple[Pass, ...]:
        return (Bake(names=(self.adapter,)),) if self.primed() else ()


@dataclass(frozen=True, kw_only=True)
class Far(Method):
    """Trains some neurons of feed-forward blocks.

    Attributes:
        share: of neurons that learn, after `bake`.
        scope: among which they are chosen: each `layer`'s own, or all of the `model`.
        metric: what of a neuron has moved: its `rows` of the first matrix, or `all` its weights.
        keep: what the learners learnt while priming stays; else they start at the base again.
        bias: also the neurons' biases.
        where: feed-forward blocks.
    """

    kinds: ClassVar[tuple[str, ...]] = ("feedforward",)
    controller: ClassVar[type[Controller]] = Priming
    folds: ClassVar[str] = "exactly"

    share: float = 0.3
    scope: Literal["layer", "model"] = "layer"
    metric: Literal["rows", "all"] = "rows"
    keep: bool = True
    bias: bool = True
    where: str = "feedforward"

    def check(self) -> None:
        self.require(0 < self.share <= 1, "share", "in (0, 1]")

    def obstacle(self, site: FeedForwardSite) -> str:
        stacks = "its neurons are those of experts. Select dense blocks with where="
        return stacks if site.experts else ""

    def insert_all(self, edit: Editor, sites: Sequence[FeedForwardSite], plan: Plan) -> None:
        del plan
        done: set[str] = set()
        for site in sites:
            neurons = neurons_of(edit.program, site, self.bias)
            _, left = parts_of(edit.program, [n.site for n in neurons.values()], self.bias)
            if reason := next((why for _, why in left if site.down not in done), ""):
                edit.skip(site, reason)
                continue
            for name, own in neurons.items():
                if name not in done:  # layers may share their weights
                    part = Part((own.site,), name, tuple(edit.stored(name).shape))
                    edit.express(own.site, name, PrimedDelta(part, edit.stored(name), own.axis))
            done.update(neurons)
            edit.edited.append(site.id)

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        primed = Priming(program, self).primed()
        if any(b.w.is_meta for _, b in primed.values()):
            raise MetaTensorError(
                "weights on the meta device have not moved. Load weights and train first "
                "(peftfx.load_weights)."
            )
        every = [s for s in program.sites if isinstance(s, FeedForwardSite)]
        blocks = {s.down: neurons_of(program, s, self.bias) for s in every}
        blocks = {down: own for down, own in blocks.items() if own and own.keys() <= primed.keys()}
        moved = {down: self._moved(own, primed) for down, own in blocks.items()}
        groups = [moved] if self.scope == "model" else [{d: m} for d, m in moved.items()]
        decided: dict[str, dict[str, Any]] = {}
        for group in groups:
            count = max(1, round(self.share * sum(m.numel() for m in group.values())))
            for down, chosen in largest(group.items(), count).items():
                for name, own in blocks[down].items():
                    index = own.index.to(chosen.device)[:, chosen].flatten().to(torch.int32)
                    decided[primed[name][0]] = {"indices": index, "kept": int(self.keep)}
        return decided

    def _moved(self, block: Mapping[str, Neurons], primed: Primed) -> Tensor:
        """How far each neuron's weights have moved, `[neurons]`."""
        total: Any = 0
        for name, own in block.items():
            if own.matrix and (own.first or self.metric == "all"):
                w = primed[name][1].w.detach()
                total = total + w.abs().sum(1 - own.axis)[own.index.to(w.device)].sum(0)
        return total
