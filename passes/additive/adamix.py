"""AdaMix: several adapters a sublayer; training runs one at random, afterwards their mean is one.

Wang et al., EMNLP 2022, arXiv:2205.12410. Behind the feed-forward block, every forward in training
draws one of M down projections and, apart from it, one of the up projections, for the whole batch:

    h <- h + U_j gelu(D_i h + b_i) + c_j,    i, j drawn anew for each layer

In evaluation, and after `bake`, an adapter has the means of the Ds and of the Us. A second forward
with other draws makes them agree: with p and q the predictions of the two,
`(KL(sg(q) | p) + KL(sg(p) | q)) / 2` joins the loss, the mean over rows that have a label or are no
padding. One up projection is shared by all, as in the authors' defaults, or there are M of them,
too (`shared_up=false`). All start N(0, 0.02^2), each by itself, with zero biases. The authors'
adapter stands in front of the sublayer's dropout; here, as all behind sublayers, behind it.

`form=lora` mixes low-rank branches beside linears instead, the paper's form for generation
(`adamix{form=lora,adapters=8,bottleneck=4,alpha=32,where=q|v}`):

    W x + alpha / r B_j A_i x,    A uniform as in LoRA, B zero: the identity at first

`bake` leaves one LoRA, of the means, which folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.pipeline.placing import of_kind
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import LinearSite, Site, SublayerSite
from ...rewriter.program.state import State
from ...rewriter.training.consistency import consistency, run_again
from ..merging.bake import Bake
from .mixtures import AdaMixBranch, AdaMixDelta


class AdaMixController(Controller):
    """The consistency of two forwards, and the merge at the end."""

    method: AdaMix

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        if not self.method.consistency:
            return None
        again = run_again(forward, batch, self.program.spec.names, self.adapter)
        return self.method.consistency * consistency(outputs, again, batch, self.adapter)

    def finish(self) -> tuple[Pass, ...]:
        mixed = any(isinstance(b, AdaMixBranch | AdaMixDelta) for _, b in self.branches())
        return (Bake(names=(self.adapter,)),) if mixed else ()


@dataclass(frozen=True, kw_only=True)
class AdaMix(Method):
    """Puts a mixture of adapters behind the selected sublayers, or beside linears.

    Attributes:
        form: `adapter`, bottlenecks behind sublayers, or `lora`, low-rank branches beside linears.
        adapters: M.
        bottleneck: inner width r; of `lora`, the rank.
        alpha: of `lora`, numerator of the scale.
        shared_up: one up projection (B) for all, or M.
        activation: between the projections.
        consistency: weight of the second forward's loss; 0 for none, and no second forward.
        std: of the normal initialisation.
    """

    folds: ClassVar[str] = "no; `bake` leaves one adapter, or a LoRA, which folds"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer", "linear")
    contract: ClassVar[Contract] = Contract("near", 0.1)
    controller: ClassVar[type[Controller]] = AdaMixController

    form: Literal["adapter", "lora"] = "adapter"
    adapters: int = 4
    bottleneck: int = 16
    alpha: float = 16.0
    shared_up: bool = True
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    consistency: float = 1.0
    std: float = 0.02
    where: str = "q|v|ffn and sublayer"

    @property
    def departures(self) -> frozenset[str]:
        """Training runs one of the adapters, evaluation their mean."""
        return frozenset(["modes"])

    def check(self) -> None:
        self.require(self.adapters >= 1, "adapters", "at least 1")
        self.require(self.bottleneck >= 1, "bottleneck", "at least 1")
        self.require(self.consistency >= 0, "consistency", "at least 0")
        self.require(0 <= self.std < 1, "std", "in [0, 1)")

    def promise(self) -> Contract:
        return Contract("identity") if self.form == "lora" else self.contract

    def sites(self, program: State) -> list[Site]:
        kind = "linear" if self.form == "lora" else "sublayer"
        form = f"adamix{{form={self.form}}}"
        return of_kind(program, super().sites(program), kind, form, self.where)

    def obstacle(self, site: LinearSite | SublayerSite) -> str:
        if self.form == "adapter" or not isinstance(site, LinearSite):
            return ""
        least = min(site.in_features, site.out_features)
        return f"rank {self.bottleneck} exceeds {least}" if self.bottleneck > least else ""

    def insert(self, edit: Editor, site: LinearSite | SublayerSite) -> None:
        if isinstance(site, LinearSite):
            edit.add(site, self._low_rank(edit, site))
            return
        ups = 1 if self.shared_up else self.adapters
        down = torch.empty(self.adapters, self.bottleneck, site.width)
        up = torch.empty(ups, site.width, self.bottleneck)
        for matrices in (down, up):
            matrices.normal_(0.0, self.std, generator=edit.generator)
        like = edit.like(site)
        edit.after(site, AdaMixBranch(down.to(like), up.to(like), self.activation))

    def _low_rank(self, edit: Editor, site: LinearSite) -> AdaMixDelta:
        a = torch.empty(self.adapters, self.bottleneck, site.in_features)
        bound = site.in_features**-0.5
        a.uniform_(-bound, bound, generator=edit.generator)
        ups = 1 if self.shared_up else self.adapters
        b = torch.zeros(ups, site.out_features, self.bottleneck)
        return AdaMixDelta(a, b, self.alpha / self.bottleneck).to(edit.like(site))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        here = self.controller(program, self).branches()
        mixed = AdaMixBranch | AdaMixDelta
        return {path: {} for path, branch in here if isinstance(branch, mixed)}
