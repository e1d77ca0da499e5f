"""VeRA: low-rank branches of two frozen random matrices that all sites share.

Kopiczko, Blankevoort and Asano, ICLR 2024, arXiv:2310.11454:

    h = W x + diag(b) B diag(d) A x

A `[rank, in]` and B `[out, rank]` are drawn once, Kaiming uniform, for the widest site, and each
site takes their first columns and rows. b starts at zero, d at 0.1, so step 0 is the base model.
Beside convolutions in groups and experts, each matrix has vectors of its own. Folds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Part
from ...rewriter.parts.shared_parts import vera
from ...rewriter.pipeline.aliases import PLACES, Alias, renamed, started_by
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import WeightSite


class Projection(nn.Module):
    """`forward() -> (A [rank, in], B [out, rank])`, the same for all sites."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent)
        self.register_buffer("b", b, persistent)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


class VeRABranch(Delta):
    """Parameters `d [rank]` and `b [out]`, of experts and groups `[count * ...]`."""

    axes: ClassVar[Axes] = {
        "d": ("rank",), "b": ("out",), "down": ("rank", "in"), "up": ("out", "rank"),
    }  # fmt: skip

    def __init__(self, d: Tensor, b: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        self.d, self.b = nn.Parameter(d), nn.Parameter(b)
        self.width, self.dropout = width, dropout

    def _factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """What this weight takes of the shared matrices, one pair for each of its own."""
        count = self.shape.count
        a, b = down[:, : self.width], up[: len(self.b) // count]
        return (a, b) if count == 1 else (a.expand(count, -1, -1), b.expand(count, -1, -1))

    def branch(self, x: Tensor, down: Tensor, up: Tensor, **operands: Tensor) -> Tensor:
        a, b = self._factors(down, up)
        h = self.shape.narrow(self.dropped(x), a, **operands)
        h = h * self.shape.along(self.d.to(h.dtype), h, **operands)
        y = self.shape.widen(h, b, **operands)
        return y * self.shape.along(self.b.to(y.dtype), y, **operands)

    def delta(self, down: Tensor, up: Tensor) -> Tensor:
        a, b = self._factors(down, up)
        lead = b.shape[:-2]
        scaled = self.b.view(*lead, -1, 1) * b, self.d.view(*lead, -1, 1) * a
        return self.shape.product(*scaled)

    def part(self) -> Part | None:
        if len(self.constants) < 2 or self.shape.count > 1:
            return None
        shared, own = self.constants, (self.d.detach(), self.b.detach())
        return vera("", *own, shared["down"], shared["up"], self.width, self.dropout)

    def describe(self) -> str:
        return f"rank={len(self.d) // self.shape.count}"


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Adds the branches, which learn vectors alone.

    Attributes:
        rank: of the shared matrices; more than of LoRA, since only vectors train.
        d_initial: what d starts as.
        dropout: probability on the branch's input, in training.
        save_projection: whether files hold the matrices, too; else they are drawn from the seed
            again, which torch promises for one version alone.
        where: the paper adapts queries and values.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding", "experts")
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(r="rank", vera_dropout="dropout", projection_prng_key="seed"),
        "init_weights": started_by(),
    }

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    save_projection: bool = True
    where: str = "q|v"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        finite = math.isfinite(self.d_initial) and self.d_initial != 0
        self.require(finite, "d_initial", "a finite number other than 0, or nothing would train")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def obstacle(self, site: WeightSite) -> str:
        lookup = site.kind == "embedding" and self.dropout
        return "ids have no dropout; leave it out" if lookup else ""

    def insert_all(self, edit: Editor, sites: Sequence[WeightSite], plan: Plan) -> None:
        sites = self.free(edit, sites)
        if not sites:
            return
        width = max(site.matrices[2] for site in sites)
        height = max(site.matrices[1] for site in sites)
        a, b = projections(self.rank, width, height, edit.generator)
        shared = Projection(a, b, self.save_projection).to(edit.like(sites[0]))
        both = edit.share("projection", shared)
        down, up = edit.item(both, 0), edit.item(both, 1)
        for site in sites:
            count, out, size = site.matrices
            like = edit.like(site)
            d = like.new_full((count * self.rank,), self.d_initial)
            branch = VeRABranch(d, like.new_zeros(count * out), size, self.dropout)
            edit.add(site, branch, down=down, up=up)


def projections(
    rank: int, width: int, height: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B, in the order in which PEFT draws them."""
    matrices = torch.empty(rank, width), torch.empty(height, rank)
    for matrix in matrices:
        nn.init.kaiming_uniform_(matrix, generator=generator)
    return matrices
