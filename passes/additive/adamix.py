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
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import ACTIVATIONS, BottleneckBranch
from ...rewriter.branches.branch import Axes, Delta, Serial
from ...rewriter.branches.parts import Bottleneck, Part
from ...rewriter.branches.shapes import linear
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
from ..reparameterized.lora import LoRABranch


class AdaMixBranch(Serial):
    """`down [M, r, d]`, `down_bias [M, r]`, `up [M or 1, d, r]`, `up_bias [M or 1, d]`."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[Axes] = {
        "down": ("expert", "rank", "width"), "down_bias": ("expert", "rank"),
        "up": ("expert", "width", "rank"), "up_bias": ("expert", "width"),
    }  # fmt: skip

    def __init__(self, down: Tensor, up: Tensor, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = nn.Parameter(down.new_zeros(down.shape[:2]))
        self.up_bias = nn.Parameter(up.new_zeros(up.shape[:2]))
        self.activation = activation

    def update(self, h: Tensor) -> Tensor:
        down, down_bias = self.one(self.down, self.down_bias)
        up, up_bias = self.one(self.up, self.up_bias)
        return linear(ACTIVATIONS[self.activation](linear(h, down, down_bias)), up, up_bias)

    def one(self, matrices: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """One projection: drawn in training, else the mean."""
        if not self.training or len(matrices) == 1:
            return matrices.mean(0), biases.mean(0)
        drawn = torch.randint(len(matrices), (1,), device=matrices.device)
        return matrices.index_select(0, drawn)[0], biases.index_select(0, drawn)[0]

    def merged(self) -> Bottleneck:
        """The one adapter that is left."""
        down, up, down_bias, up_bias = (
            p.detach().mean(0) for p in (self.down, self.up, self.down_bias, self.up_bias)
        )
        return Bottleneck("", down, up, down_bias, up_bias, self.activation)

    def settled(self, **decided: Any) -> BottleneckBranch:
        return BottleneckBranch(self.merged(), self.down)

    def part(self) -> Part:
        return self.merged()

    def describe(self) -> str:
        return f"{len(self.down)} x {len(self.up)} of bottleneck={self.down.shape[1]}"


class AdaMixDelta(Delta):
    """`a [M, r, in]`, `b [M or 1, out, r]`."""

    not_foldable = "training runs one of its experts; `bake` leaves their mean"
    axes: ClassVar[Axes] = {"a": ("expert", "rank", "in"), "b": ("expert", "out", "rank")}

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def branch(self, x: Tensor) -> Tensor:
        return linear(linear(x, _one(self, self.a)), _one(self, self.b)) * self.scale

    def settled(self, **decided: Any) -> LoRABranch:
        a, b = (p.detach().mean(0) for p in (self.a, self.b))
        return LoRABranch(a, b, self.scale, 0.0)

    def part(self) -> Part:
        return self.settled().part()

    def describe(self) -> str:
        return f"{len(self.a)} x {len(self.b)} of rank={self.a.shape[1]}, scale={self.scale:g}"


def _one(branch: nn.Module, experts: Tensor) -> Tensor:
    """One of several: drawn in training, else the mean."""
    if not branch.training or len(experts) == 1:
        return experts.mean(0)
    drawn = torch.randint(len(experts), (1,), device=experts.device)
    return experts.index_select(0, drawn)[0]


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
