"""AdaLoRA: `y = x W^T + b + c ((drop(x) Q^T) diag(e)) P^T`, its ranks chosen while it trains.

Zhang et al., ICLR 2023, arXiv:2303.10512. `P [out, rank]` and `Q [rank, in]` stay nearly orthogonal
by a loss term, so that `e [rank]` are like singular values; the least important of all sites become
zero until a common budget is met, and may grow again until the last phase. The importance of rank i
is `S(e_i) + mean_j S(P_ji) + mean_j S(Q_ij)`, with S of `rewriter/training/budget.py`; P, Q and the
optimizer's state go on. P and Q start normal (std 0.02) and e as zero, so step 0 is the base model.
`c = alpha / rank`, also when fewer ranks are left. Folds exactly: `W + c P diag(e) Q`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ...kernels.orthogonality import orthogonality_gap
from ...rewriter.branches.branch import Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import LowRank, Part
from ...rewriter.pipeline.aliases import Alias, renamed
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.options import BySite
from ...rewriter.pipeline.passes import Pass, Saved
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ...rewriter.training.budget import BudgetController, Budgeted
from ..merging.bake import Bake
from .initial_factors import rank_obstacle


class AdaLoRABranch(Delta):
    """`p [out, rank]`, `e [rank]`, `q [rank, in]`; ranks with zero e are pruned."""

    def __init__(self, p: Tensor, e: Tensor, q: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.p, self.e, self.q = nn.Parameter(p), nn.Parameter(e), nn.Parameter(q)
        self.scale, self.dropout = scale, dropout

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        return self.shape.low_rank(self.dropped(x), self.q, self.p, self.e * self.scale, **operands)

    def delta(self) -> Tensor:
        return (self.p * (self.e * self.scale)) @ self.q

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.q * self.e[:, None], self.p, self.scale) if self.at_linear else None

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


class RankController(BudgetController):
    """Keeps P and Q orthogonal, and sets the e of pruned ranks to zero."""

    def parts(self, branch: Any) -> int:
        return branch.e.numel()

    def importance(self, path: str) -> Tensor:
        p, e, q = (self.sensitivity.score(f"{path}.{n}") for n in "peq")
        return e + p.mean(0) + q.mean(1)

    def keep(self, branch: Any, kept: Tensor) -> None:
        branch.e.masked_fill_(~kept, 0.0)

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        options = cast(AdaLoRA, self.method)
        factors = [rows for _, b in self.branches() for rows in (b.p.mT, b.q)]
        if not factors or not options.gamma:
            return None
        gaps = [orthogonality_gap(rows) for rows in factors]
        if options.orth == "squared_sum":
            return options.gamma * torch.stack([g.square().sum() for g in gaps]).sum()
        return options.gamma * torch.stack([g.norm() for g in gaps]).mean()

    def finish(self) -> tuple[Pass, ...]:
        pruned = cast(AdaLoRA, self.method).settle(self.program, None, {})
        return (Bake(names=(self.adapter,)),) if pruned else ()


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Budgeted):
    """Adds branches whose ranks are pruned to a common budget in training.

    Attributes:
        rank: of a branch at first, maybe by site; sites with min(in, out) below it are skipped.
        target: the budget at the end, in ranks a site on average; two thirds of rank by default.
        alpha: numerator of the scale, maybe by site.
        dropout: probability on the branch's input, in training.
        gamma: weight of the orthogonality loss; 0 for none.
        orth: `mean` of all Frobenius norms, as released, or `squared_sum`, as in the paper.
        where: the paper adapts all linears of the blocks.
    """

    controller: ClassVar[type[Controller]] = RankController
    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding", "experts")
    aliases: ClassVar[dict[str, Alias]] = Budgeted.aliases | renamed(
        init_r="rank", target_r="target", lora_dropout="dropout", orth_reg_weight="gamma"
    )

    rank: BySite[int] = 12
    target: BySite[int | None] = None
    alpha: BySite[float] = 16.0
    dropout: float = 0.0
    gamma: float = 0.1
    orth: Literal["mean", "squared_sum"] = "mean"
    where: str = "q|k|v|o|ffn"

    @property
    def left(self) -> int:
        """The target, or the paper's two thirds of rank."""
        return max(1, round(self.rank / 1.5)) if self.target is None else self.target

    def check(self) -> None:
        super().check()
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(0 <= self.left <= self.rank, "target", f"in [0, {self.rank}], the rank")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.require(0 <= self.gamma < math.inf, "gamma", "finite and not negative")

    def obstacle(self, site: WeightSite) -> str:
        if (count := site.matrices[0]) > 1:
            return f"its {count} matrices would be left with different ranks. Use lora there"
        return rank_obstacle(self.rank, self.dropout, site)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        like, (_, out, size) = edit.like(site), site.matrices
        shapes = (out, self.rank), (self.rank, size)
        p, q = (torch.randn(s, generator=edit.generator) * 0.02 for s in shapes)
        branch = p.to(like), like.new_zeros(self.rank), q.to(like), self.alpha / self.rank
        edit.add(site, AdaLoRABranch(*branch, self.dropout))

    def saved_part(self, saved: Saved) -> Part | None:
        p, e, q = (saved.tensors[name] for name in "peq")
        return LowRank(saved.target, q, p * e, self.alpha / self.rank)

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        mine = ((a.path, program.branch(a)) for a in program.attached_by(self.adapter))
        return {
            path: {"kept": branch.kept()} for path, branch in mine
            if isinstance(branch, AdaLoRABranch) and len(branch.kept()) < branch.e.numel()
        }  # fmt: skip
