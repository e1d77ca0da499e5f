"""LoRA: `y = x W^T + b + s (drop(x) A^T) B^T`, with `A [rank, in]`, `B [out, rank]`.

Hu et al., ICLR 2022, arXiv:2106.09685. `s = alpha / rank`, or `alpha / sqrt(rank)` for rank
stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732). A is Kaiming uniform (a = sqrt 5), B zero,
so step 0 is the base model. Folds exactly: `W + s B A`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta, linear
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.program.sites import LinearSite


class LoRABranch(Delta):
    """The low-rank branch; parameters `a [rank, in]` and `b [out, rank]`."""

    axes: ClassVar[Axes] = {"a": ("rank", "in"), "b": ("out", "rank")}

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    def branch(self, x: Tensor) -> Tensor:
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return linear(linear(x, self.a) * self.scale, self.b)  # scales rank columns, not out

    def delta(self) -> Tensor:
        return (self.b @ self.a) * self.scale

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return self.a, self.b, self.scale

    def describe(self) -> str:
        return f"rank={self.a.shape[0]}, scale={self.scale:g}"


def rank_obstacle(rank: int, site: LinearSite) -> str:
    """Why a rank does not fit a linear; empty if it does."""
    limit = min(site.in_features, site.out_features)
    if rank <= limit:
        return ""
    return (
        f"rank={rank}, but it must be at most {limit} for {site.in_features} -> "
        f"{site.out_features} features. Give such sites a smaller rank, in a pass of their own"
    )


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Adds a trainable low-rank branch beside every selected linear.

    Attributes:
        rank: of the branch; sites with min(in, out) below it are skipped.
        alpha: numerator of the scale.
        dropout: probability on the branch's input, in training.
        rslora: scale by alpha / sqrt(rank).
        where: the paper adapts queries and values.
    """

    folds: ClassVar[str] = "exactly"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    where: str = "q|v"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def obstacle(self, site: LinearSite) -> str:
        return rank_obstacle(self.rank, site)

    def insert(self, edit: Editor, site: LinearSite) -> None:
        edit.add(site, self.made(edit, site))

    def made(self, edit: Editor, site: LinearSite) -> LoRABranch:
        """The branch for one site, freshly initialised."""
        like = edit.like(site)
        a = torch.empty(self.rank, site.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=edit.generator)
        b = torch.zeros(site.out_features, self.rank)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        return LoRABranch(a.to(like), b.to(like), scale, self.dropout)
