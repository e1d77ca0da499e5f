"""Compacter: `h <- h + H_U sigma(H_D h + b_D) + b_U`, with `H = sum_i A_i (x) B_i` of n products.

Karimi Mahabadi et al., NeurIPS 2021, arXiv:2106.04647. A serial adapter behind each sublayer, whose
projections are parameterised hypercomplex multiplications (PHM): the A_i `[n, n]` are shared by
both projections of all layers, `B_i = S_i T_i` is of low rank. H is never built while it trains:
S, A and T act on the values one behind the other. S and T start Xavier uniform with gain sqrt(2),
shared A N(0, 1e-4^2) and own ones N(0, 0.01^2), biases at zero: nearly the identity. All layer
norms train, too. Compacter++ is `compacter{where=ffn and sublayer}`, and the paper's PHM adapter
`compacter{rank=none,shared=false}`: B_i whole, A_i of each projection its own. Not foldable,
because of the non-linearity; `bake` leaves an ordinary adapter, with H as two small matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.measure.constants import constant_reads
from ...rewriter.parts.parts import Hypercomplex
from ...rewriter.pipeline.aliases import Alias, instead, renamed
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import SublayerSite
from ...rewriter.program.state import State
from .kronecker_sums import insert_hypercomplex


@dataclass(frozen=True, kw_only=True)
class Compacter(Method):
    """Puts an adapter of hypercomplex projections behind every selected sublayer.

    Attributes:
        n: how many Kronecker products are summed; it divides the width and the bottleneck.
        bottleneck: inner width r (the paper: width / 32).
        rank: of the B_i; none for whole ones.
        shared: one set of A_i for all projections, or each its own.
        activation: between the projections.
        norms: also train all normalisation parameters, as the paper does.
    """

    folds: ClassVar[str] = "no: not linear; `bake` leaves an ordinary adapter"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("near", 0.1)
    aliases: ClassVar[Mapping[str, Alias]] = {
        "reduction_factor": instead("bottleneck= is the inner width itself: hidden size / factor"),
        **renamed(phm_dim="n", phm_rank="rank", shared_phm_rule="shared"),
        **renamed(non_linearity="activation"),
    }

    n: int = 4
    bottleneck: int = 24
    rank: int | None = 1
    shared: bool = True
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    norms: bool = True
    where: str = "attn|ffn"

    def check(self) -> None:
        self.require(self.n >= 1, "n", "at least 1")
        self.require(self.rank is None or self.rank >= 1, "rank", "none, or at least 1")
        divides = self.bottleneck >= 1 and self.bottleneck % self.n == 0
        self.require(divides, "bottleneck", f"a multiple of n={self.n}")

    def obstacle(self, site: SublayerSite) -> str:
        if not site.width % self.n:
            return ""
        return f"n={self.n} does not divide its width {site.width}. Choose another n="

    def insert_all(self, edit: Editor, sites: Sequence[SublayerSite], plan: Plan) -> None:
        shared = self._drawn(edit, 1e-4) if self.shared else None
        insert_hypercomplex(edit, [(site, self.made(edit, site, shared)) for site in sites])
        if self.norms:
            edit.train_norms()

    def made(self, edit: Editor, site: SublayerSite, rule: Tensor | None) -> Hypercomplex:
        """The tensors of one site, freshly initialised, with these A_i or its own."""
        own: dict[str, Any] = {"activation": self.activation}
        width, inner = site.width // self.n, self.bottleneck // self.n
        for name, (rows, columns) in {"down": (width, inner), "up": (inner, width)}.items():
            own[f"{name}_rule"] = self._drawn(edit, 0.01) if rule is None else rule
            r = self.rank
            sizes = [(rows, columns)] if r is None else [(rows, r), (r, columns)]
            for side, size in zip(("left", "right"), sizes, strict=False):
                bound = (12 / sum(size)) ** 0.5  # Xavier's, with gain sqrt(2)
                factor = torch.empty(self.n, *size)
                own[f"{name}_{side}"] = factor.uniform_(-bound, bound, generator=edit.generator)
        own |= {"down_bias": torch.zeros(self.bottleneck), "up_bias": torch.zeros(site.width)}
        return Hypercomplex("", **own)

    def _drawn(self, edit: Editor, std: float) -> Tensor:
        """A `[n, n, n]` at the start."""
        return torch.empty(self.n, self.n, self.n).normal_(0.0, std, generator=edit.generator)

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        return constant_reads(program, program.attached_by(self.adapter))
