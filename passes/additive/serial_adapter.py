"""Serial adapter: `h <- h + U sigma(D h + b_D) + b_U` on each sublayer's output.

Houlsby et al., ICML 2019, arXiv:1902.00751. The adapter reads the sublayer's output after its
dropout, has its own skip connection, and comes before the residual add and the norm. D and U
start truncated normal with std 1e-3 and zero biases: nearly the identity. The paper also trains
all layer norms. In Pfeiffer's placement (EACL 2021, arXiv:2005.00247) there is one adapter a block,
behind its feed-forward, and D reads the stream there instead of h: their sum, in a post-norm model
behind its norm, which is evaluated twice. Not foldable, because of the non-linearity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import ACTIVATIONS
from ...rewriter.branches.branch import Axes, Serial
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Bottleneck, Part
from ...rewriter.pipeline.aliases import Alias, instead, renamed
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import Site, SublayerSite
from ...rewriter.program.state import State


class SerialAdapterBranch(Serial):
    """Bottleneck with skip; `down [r, d]`, `down_bias [r]`, `up [d, r]`, `up_bias [d]`."""

    not_foldable = "its activation function is not linear"
    axes: ClassVar[Axes] = {
        "down": ("rank", "width"), "down_bias": ("rank",),
        "up": ("width", "rank"), "up_bias": ("width",), "seen": ("...", "width"),
    }  # fmt: skip

    def __init__(self, down: Tensor, up: Tensor, activation: str, biases: bool = True) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = nn.Parameter(down.new_zeros(down.shape[0])) if biases else None
        self.up_bias = nn.Parameter(up.new_zeros(up.shape[0])) if biases else None
        self.activation = activation

    def update(self, h: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen`: what D reads instead of h, of its shape."""
        h = h if seen is None else self.features_last(seen)
        return linear(self.units(h), self.up, self.up_bias)

    def units(self, z: Tensor) -> Tensor:
        """What the r inner units give for what D reads."""
        inner = linear(z, self.down, self.down_bias)
        return ACTIVATIONS[self.activation](inner)

    def part(self) -> Part:
        own = (self.down, self.up, self.down_bias, self.up_bias)
        tensors: Any = (None if p is None else p.detach() for p in own)
        return Bottleneck("", *tensors, activation=self.activation)

    def describe(self) -> str:
        return f"bottleneck={self.down.shape[0]}, {self.activation}"


@dataclass(frozen=True, kw_only=True)
class SerialAdapter(Method):
    """Puts a bottleneck adapter behind every selected sublayer.

    Attributes:
        bottleneck: inner width r.
        activation: between the projections.
        biases: of both projections.
        std: of the truncated normal initialisation (cut at two deviations).
        norms: also train all normalisation parameters, as the paper does.
        placement: `houlsby` or, as AdapterHub's SeqBn (which has std=0.02, activation=relu,
            norms=false), `pfeiffer`.
    """

    folds: ClassVar[str] = "no: not linear"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("near", 0.1)
    aliases: ClassVar[Mapping[str, Alias]] = {
        "reduction_factor": instead("bottleneck= is the inner width itself: hidden size / factor"),
        **renamed(non_linearity="activation"),
    }

    bottleneck: int = 64
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    biases: bool = True
    std: float = 1e-3
    norms: bool = True
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    where: str = "attn|ffn"

    def check(self) -> None:
        self.require(self.bottleneck >= 1, "bottleneck", "at least 1")
        self.require(0 <= self.std < 1, "std", "in [0, 1)")

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        if self.placement == "houlsby" or self.placed:
            return sites
        return [s for s in sites if s.role == "ffn"] or sites

    def apply(self, edit: Editor, plan: Plan) -> None:
        super().apply(edit, plan)
        if self.norms:
            edit.train_norms()

    def insert(self, edit: Editor, site: SublayerSite) -> None:
        pfeiffer = self.placement == "pfeiffer"
        seen = edit.behind(site) if pfeiffer else None
        if seen is not None or not pfeiffer:
            edit.after(site, self.made(edit, site), seen=seen)

    def made(self, edit: Editor, site: SublayerSite) -> SerialAdapterBranch:
        """The branch for one site, freshly initialised."""
        like = edit.like(site)
        down, up = (
            torch.empty(self.bottleneck, site.width),
            torch.empty(site.width, self.bottleneck),
        )
        for matrix in (down, up):
            bounds = (-2 * self.std, 2 * self.std)
            nn.init.trunc_normal_(matrix, 0.0, self.std, *bounds, generator=edit.generator)
        return SerialAdapterBranch(down.to(like), up.to(like), self.activation, self.biases)
