"""Shared down projection: the queries and keys of a layer change in one space that both read.

    W_q' = W_q + B_q A,    W_k' = W_k + B_k A

A is random and B zero at first. One expression of both weights at once. Folds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.authors import Editor, Expression, LinearSite, Method, Plan


class SharedDownBranch(Expression):
    """`a [rank, in]`, `b [weights, out, rank]`."""

    def __init__(self, sites: Sequence[LinearSite], rank: int, edit: Editor) -> None:
        super().__init__()
        one, like = sites[0], edit.like(sites[0])
        a = torch.randn(rank, one.in_features, generator=edit.generator) / rank
        self.a = nn.Parameter(a.to(like))
        self.b = nn.Parameter(like.new_zeros(len(sites), one.out_features, rank))

    def forward(self, *w: Tensor) -> tuple[Tensor, ...]:
        return tuple(t + (b @ self.a).to(t.dtype) for t, b in zip(w, self.b, strict=True))


@dataclass(frozen=True, kw_only=True)
class SharedDown(Method):
    """Adds the updates at every layer.

    Attributes:
        rank: of the shared space.
    """

    folds: ClassVar[str] = "exactly"

    rank: int = 2
    where: str = "q|k"

    def insert_all(self, edit: Editor, sites: Sequence[LinearSite], plan: Plan) -> None:
        layers: dict[int | None, list[LinearSite]] = {}
        for site in sites:
            layers.setdefault(site.layer, []).append(site)
        for both in layers.values():
            weights = [site.weight for site in both]
            edit.express(both[0], weights, SharedDownBranch(both, self.rank, edit))
