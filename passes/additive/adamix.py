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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import ACTIVATIONS, BottleneckBranch
from ...rewriter.branches.branch import Axes, Serial
from ...rewriter.branches.parts import Bottleneck, Part
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import SublayerSite
from ...rewriter.program.state import State
from ...rewriter.training.consistency import consistency, run_again
from ..merging.bake import Bake


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


class AdaMixController(Controller):
    """The consistency of two forwards, and the merge at the end."""

    method: AdaMix

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        if not self.method.consistency:
            return None
        again = run_again(forward, batch, self.program.spec.names, self.adapter)
        return self.method.consistency * consistency(outputs, again, batch, self.adapter)

    def finish(self) -> tuple[Pass, ...]:
        mixed = any(isinstance(b, AdaMixBranch) for _, b in self.branches())
        return (Bake(names=(self.adapter,)),) if mixed else ()


@dataclass(frozen=True, kw_only=True)
class AdaMix(Method):
    """Puts a mixture of bottleneck adapters behind the selected sublayers.

    Attributes:
        adapters: M.
        bottleneck: inner width r.
        shared_up: one up projection for all, or M.
        activation: between the projections.
        consistency: weight of the second forward's loss; 0 for none, and no second forward.
        std: of the normal initialisation.
    """

    folds: ClassVar[str] = "no: not linear; `bake` leaves one adapter"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("near", 0.1)
    controller: ClassVar[type[Controller]] = AdaMixController

    adapters: int = 4
    bottleneck: int = 16
    shared_up: bool = True
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    consistency: float = 1.0
    std: float = 0.02
    where: str = "ffn and sublayer"

    @property
    def departures(self) -> frozenset[str]:
        """Training runs one of the adapters, evaluation their mean."""
        return frozenset(["modes"])

    def check(self) -> None:
        self.require(self.adapters >= 1, "adapters", "at least 1")
        self.require(self.bottleneck >= 1, "bottleneck", "at least 1")
        self.require(self.consistency >= 0, "consistency", "at least 0")
        self.require(0 <= self.std < 1, "std", "in [0, 1)")

    def insert(self, edit: Editor, site: SublayerSite) -> None:
        ups = 1 if self.shared_up else self.adapters
        down = torch.empty(self.adapters, self.bottleneck, site.width)
        up = torch.empty(ups, site.width, self.bottleneck)
        for matrices in (down, up):
            matrices.normal_(0.0, self.std, generator=edit.generator)
        like = edit.like(site)
        edit.after(site, AdaMixBranch(down.to(like), up.to(like), self.activation))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        here = self.controller(program, self).branches()
        return {path: {} for path, branch in here if isinstance(branch, AdaMixBranch)}
