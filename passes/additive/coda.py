"""CoDA: frozen blocks run on k = ceil(n / reduction) of n tokens, all tokens get an adapter.

Lei et al., NeurIPS 2023, arXiv:2304.04947. With R the block (attention and feed-forward), x^ what
its first linear reads (the norm of X before the block; X itself where norms come behind sums),

    s = x^ w,    m = argmax { s . m + eps H(m) : 0 <= m <= 1, sum m = k },    P: the k largest
    Y = X + P^T diag(P m) (R(P X) - P X) + U gelu(D x^ + b_D) + b_U

Attention is among the taken tokens alone, at their own positions; all tokens get the adapter. w
learns through m. The paper finds m by coordinate descent, which misses the sum at a small eps; the
exact solution is the default. U starts at zero and w small, but the routing itself changes the
outputs from the first step. Rows are routed over their valid tokens, so padding does not matter.

A decoder's later tokens would decide which earlier ones are taken, so causal streams are refused,
or routed with causal=prefill: right for scoring or prefilling whole prompts, not for generation
token by token. An encoder-decoder is routed in its encoder. Not foldable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.soft_topk import coordinate_descent, soft_topk
from ...rewriter.branches.routing import Routed
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import AttentionSite, Site, SublayerSite
from ...rewriter.program.state import State


class CoDABranch(Routed):
    """`router [d]`, `down [r, d]`, `down_bias [r]`, `up [d, r]`, `up_bias [d]`."""

    def __init__(self, router: Tensor, down: Tensor, options: CoDA) -> None:
        super().__init__(options.reduction)
        self.router, self.down = nn.Parameter(router), nn.Parameter(down)
        self.down_bias = nn.Parameter(down.new_zeros(down.shape[0]))
        self.up = nn.Parameter(down.new_zeros(down.shape[1], down.shape[0]))
        self.up_bias = nn.Parameter(down.new_zeros(down.shape[1]))
        self.epsilon, self.iterations = options.epsilon, options.iterations

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.router.to(x.dtype)

    def weights(self, scores: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
        if self.iterations is None:
            return soft_topk(scores, count, self.epsilon, valid)
        return coordinate_descent(scores, count, self.epsilon, self.iterations, valid)

    def aside(self, x: Tensor) -> Tensor:
        return linear(F.gelu(linear(x, self.down, self.down_bias)), self.up, self.up_bias)

    def describe(self) -> str:
        return f"1/{self.reduction} of the tokens, bottleneck={self.down.shape[0]}"


@dataclass(frozen=True, kw_only=True)
class CoDA(Method):
    """Routes the blocks of the selected sublayers.

    Attributes:
        reduction: n / k.
        bottleneck: inner width r of the adapter.
        epsilon: temperature of the soft top-k.
        iterations: of coordinate descent; none solves exactly.
        std: of the router's initial values.
        causal: `refuse` decoders' blocks, or route them for whole prompts only (`prefill`).
    """

    folds: ClassVar[str] = "no: which tokens it takes depends on the input"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("trainable")

    reduction: int = 3
    bottleneck: int = 64
    epsilon: float = 0.1
    iterations: int | None = None
    std: float = 0.02
    causal: Literal["refuse", "prefill"] = "refuse"
    where: str = "attn|ffn"

    def check(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(self.bottleneck >= 1, "bottleneck", "at least 1")
        self.require(self.epsilon > 0, "epsilon", "above 0")
        steps = self.iterations
        self.require(steps is None or 1 <= steps <= 1000, "iterations", "none or in [1, 1000]")
        self.require(self.std >= 0, "std", "at least 0")

    @property
    def departures(self) -> frozenset[str]:
        """With causal=prefill, later tokens decide which earlier ones are taken."""
        return frozenset(["tokens"] if self.causal == "prefill" else [])

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        causal = {s.stream for s in program.sites if isinstance(s, AttentionSite) and s.causal}
        return sites if self.placed else [s for s in sites if s.stream not in causal] or sites

    def apply(self, edit: Editor, plan: Plan) -> None:
        blocks: dict[tuple[str, int | None], list[SublayerSite]] = {}
        for name in plan.decisions["sites"]:
            site = edit.program.sites[name]
            blocks.setdefault((site.stream, site.layer), []).append(site)  # pyright: ignore
        for sites in blocks.values():
            like, width = edit.like(sites[0]), sites[0].width
            router = torch.empty(width).normal_(0.0, self.std, generator=edit.generator)
            down = torch.empty(self.bottleneck, width)
            down.normal_(0.0, width**-0.5, generator=edit.generator)
            branch = CoDABranch(router.to(like), down.to(like), self)
            edit.wrap(sites, branch, causal=self.causal == "prefill", allow="causal=prefill")
