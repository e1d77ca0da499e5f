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
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.branches.parts import LowRank, Part
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.program.sites import EmbeddingSite, WeightSite


class LoRABranch(Delta):
    """The low-rank branch; parameters `a [rank, in]` and `b [out, rank]`."""

    axes: ClassVar[Axes] = {"a": ("rank", "in"), "b": ("out", "rank")}

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        return self.shape.low_rank(self.dropped(x), self.a, self.b, self.scale, **operands)

    def delta(self) -> Tensor:
        return self.shape.product(self.b * self.scale, self.a)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.a, self.b, self.scale) if self.at_linear else None

    def part(self) -> Part:
        a, b = self.a.detach(), self.b.detach()
        return LowRank("", a, b, self.scale, dropout=self.dropout)

    def describe(self) -> str:
        return f"rank={self.a.shape[-2]}, scale={self.scale:g}"


def rank_obstacle(rank: int, dropout: float, site: WeightSite) -> str:
    """Why a low-rank branch does not fit a site; empty if it does."""
    count, out, size = site.matrices
    limit = min(size, out)
    if rank > limit:
        each = f" of each of {count} matrices" if count > 1 else ""
        return (
            f"rank={rank}, but it must be at most {limit} for {size} -> {out} features{each}. "
            "Give such sites a smaller rank, in a pass of their own"
        )
    if dropout and isinstance(site, EmbeddingSite):
        return f"dropout={dropout:g} is on what is read, and ids cannot be dropped. Set dropout=0"
    return ""


def low_rank_parameters(
    site: WeightSite, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`(a [rank, in], b [out, rank])`, or with the number of matrices in front, whose product is
    zero. An embedding's a is zero, so that only rows that are looked up ever change."""
    count, out, size = site.matrices
    a, b = torch.empty(count * rank, size), torch.zeros(count * out, rank)
    if isinstance(site, EmbeddingSite):
        nn.init.zeros_(a), nn.init.normal_(b, generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    if count == 1:
        return a, b
    return a.unflatten(0, (count, rank)), b.unflatten(0, (count, out))


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Adds a trainable low-rank branch beside every selected weight.

    Beside a convolution, A is one of `rank` channels and B one of kernel 1, in each group; beside
    experts, each has factors of its own; of an embedding, the rows of `A^T` are looked up.

    Attributes:
        rank: of the branch; sites with min(in, out) below it are skipped.
        alpha: numerator of the scale.
        dropout: probability on the branch's input, in training.
        rslora: scale by alpha / sqrt(rank).
        where: the paper adapts queries and values.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding", "experts")

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    where: str = "q|v"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def obstacle(self, site: WeightSite) -> str:
        return rank_obstacle(self.rank, self.dropout, site)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        edit.add(site, self.made(edit, site))

    def made(self, edit: Editor, site: WeightSite) -> LoRABranch:
        """The branch for one site, freshly initialised."""
        like = edit.like(site)
        a, b = low_rank_parameters(site, self.rank, edit.generator)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        return LoRABranch(a.to(like), b.to(like), scale, self.dropout)
