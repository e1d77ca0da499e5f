"""AdaLoRA: `y = x W^T + b + c ((drop(x) Q^T) diag(e)) P^T`, its ranks chosen while it trains.

Zhang et al., ICLR 2023, arXiv:2303.10512. `P [out, rank]` and `Q [rank, in]` stay nearly orthogonal
by a loss term, so that `e [rank]` are like singular values; the least important of all sites become
zero until a common budget is met (`adalora_budget.py`), and may grow again until the last phase.
P and Q start normal (std 0.02) and e as zero, so step 0 is the base model. `c = alpha / rank`, also
when fewer ranks are left. Folds exactly: `W + c P diag(e) Q`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.edits.branch import Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.program import Program
from ...rewriter.running.controller import Controller
from ...rewriter.running.passes import Method
from ...rewriter.sites.sites import LinearSite
from .adalora_budget import AdaLoRAController


class AdaLoRABranch(Delta):
    """`p [out, rank]`, `e [rank]`, `q [rank, in]`; ranks with zero e are pruned."""

    def __init__(self, p: Tensor, e: Tensor, q: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.p, self.e, self.q = nn.Parameter(p), nn.Parameter(e), nn.Parameter(q)
        self.scale, self.dropout = scale, dropout

    def branch(self, x: Tensor) -> Tensor:
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.q) * (self.e * self.scale), self.p)

    def delta(self) -> Tensor:
        return (self.p * (self.e * self.scale)) @ self.q

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return self.q * self.e[:, None], self.p, self.scale

    def kept(self) -> list[int]:
        """The ranks that are not pruned."""
        return self.e.detach().nonzero().flatten().tolist()

    def settled(self, **decided: Any) -> AdaLoRABranch | None:
        kept: list[int] = decided["kept"]
        if not kept:
            return None
        p, e, q = (t.detach() for t in (self.p[:, kept], self.e[kept], self.q[kept]))
        return AdaLoRABranch(p.clone(), e.clone(), q.clone(), self.scale, self.dropout)

    def describe(self) -> str:
        return f"rank={self.e.shape[0]}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Adds branches whose ranks are pruned to a common budget in training.

    Attributes:
        rank: of every branch at first, at most min(in, out).
        target: the budget at the end, in ranks a site on average; two thirds of rank by default.
        alpha: numerator of the scale.
        dropout: probability on the branch's input, in training.
        warmup, final: steps before and after pruning; below 1, a share of all steps.
        interval: steps between two prunings (after pruning, and at the last step, every step).
        beta1, beta2: of the moving averages of importance and of its uncertainty.
        gamma: weight of the orthogonality loss; 0 for none.
        orth: `mean` of all Frobenius norms, as released, or `squared_sum`, as in the paper.
        where: the paper adapts all linears of the blocks.
    """

    controller: ClassVar[type[Controller]] = AdaLoRAController
    folds: ClassVar[str] = "exactly"

    rank: int = 12
    target: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    orth: Literal["mean", "squared_sum"] = "mean"
    where: str = "q|k|v|o|ffn"

    @property
    def final_rank(self) -> int:
        """The target, or the paper's two thirds of rank."""
        return max(1, round(self.rank / 1.5)) if self.target is None else self.target

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(0 <= self.final_rank <= self.rank, "target", f"in [0, {self.rank}], the rank")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(self.interval >= 1, "interval", "at least 1")
        self.require(0 <= self.gamma < math.inf, "gamma", "finite and not negative")
        for option in ("dropout", "beta1", "beta2"):
            self.require(0 <= getattr(self, option) < 1, option, "in [0, 1)")
        for option in ("warmup", "final"):
            share = getattr(self, option)
            whole = share < 1 or share == int(share)
            self.require(share >= 0 and whole, option, "a whole number, or a share below 1")

    def insert(self, edit: Editor, site: LinearSite) -> None:
        limit = min(site.in_features, site.out_features)
        self.require(self.rank <= limit, "rank", f"at most {limit} at {site.id}")
        weight = edit.weight(site)
        like = torch.empty(0, device=weight.device, dtype=weight.dtype)
        shapes = (site.out_features, self.rank), (self.rank, site.in_features)
        p, q = (torch.randn(s, generator=edit.generator) * 0.02 for s in shapes)
        e = torch.zeros(self.rank)
        scale = self.alpha / self.rank
        edit.add(site, AdaLoRABranch(p.to(like), e.to(like), q.to(like), scale, self.dropout))

    def settle(
        self, program: Program, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for attachment in program.attachments:
            branch = program.branch(attachment)
            if attachment.adapter == self.adapter and isinstance(branch, AdaLoRABranch):
                kept = branch.kept()
                if len(kept) < branch.e.numel():
                    found[attachment.path] = {"kept": kept}
        return found
