"""VeRA: low-rank branches of two frozen random matrices that all sites share.

Kopiczko et al., ICLR 2024, arXiv:2310.11454:

    h = W x + diag(b) B diag(d) A x

A and B are drawn once for the largest site, and each takes their first columns and rows; b starts
at zero, d at 0.1. Folds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.rewriter.branches.branch import Axes, Delta
from peftfx.rewriter.branches.shapes import linear
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.program.history import Plan
from peftfx.rewriter.program.sites import LinearSite


class Projection(nn.Module):
    """`forward() -> (A [rank, in], B [out, rank])`."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


class VeRABranch(Delta):
    """`d [rank]`, `b [out]`."""

    axes: ClassVar[Axes] = {
        "d": ("rank",), "b": ("out",), "down": ("rank", "in"), "up": ("out", "rank"),
    }  # fmt: skip

    def __init__(self, site: LinearSite, rank: int, like: Tensor) -> None:
        super().__init__()
        self.width = site.in_features
        self.d = nn.Parameter(like.new_full((rank,), 0.1))
        self.b = nn.Parameter(like.new_zeros(site.out_features))

    def branch(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = linear(x, down[:, : self.width]) * self.d.to(x.dtype)
        return linear(inner, up[: len(self.b)]) * self.b.to(x.dtype)

    def delta(self, down: Tensor, up: Tensor) -> Tensor:
        return self.b[:, None] * (up[: len(self.b)] @ (self.d[:, None] * down[:, : self.width]))


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Adds the branches at linears.

    Attributes:
        rank: of the shared matrices.
    """

    folds: ClassVar[str] = "exactly"

    rank: int = 16
    where: str = "q|v"

    def insert_all(self, edit: Editor, sites: Sequence[LinearSite], plan: Plan) -> None:
        width = max(s.in_features for s in sites)
        height = max(s.out_features for s in sites)
        a = torch.empty(self.rank, width)
        b = torch.empty(height, self.rank)
        for matrix in (a, b):
            nn.init.kaiming_uniform_(matrix, generator=edit.generator)
        shared = Projection(a, b).to(edit.like(sites[0]))
        both = edit.share("projection", shared)
        for site in sites:
            branch = VeRABranch(site, self.rank, edit.like(site))
            edit.add(site, branch, down=edit.item(both, 0), up=edit.item(both, 1))
