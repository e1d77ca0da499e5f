"""DoRA: `y = c * (W x + s B A drop(x)) + b`, `c = m / ||V||_row`, `V = W + s B A`.

Liu et al., ICML 2024, arXiv:2402.09353. The magnitude `m [out]` of every row of W trains apart from
its direction V. m starts as the row norms of W and B as zero, so that c is exactly one and step 0
is the base model. The norm counts as a constant in the gradient, as in section 4.3 of the paper.
It is computed without B A, in at least float32 (rounding it moves c by more than a typical delta):

    ||V_i||^2 = ||W_i||^2 + sum_j (2 s W A^T + s^2 B A A^T)_ij B_ij

Folds exactly: `diag(c) (W + s B A)`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.low_rank import low_rank
from ...rewriter.edits.branch import RowScale
from ...rewriter.edits.edit import Editor
from ...rewriter.running.passes import Method
from ...rewriter.sites.sites import LinearSite


def squared_norms(weight: Tensor) -> Tensor:
    """`||W_i||^2 [out]` of a weight `[out, in]`, in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()


def root(squares: Tensor) -> Tensor:
    """Square roots; a row of zeros has the smallest norm that can be divided by."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands, under autocast, too."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class DoRABranch(RowScale):
    """Magnitude and low-rank direction; `m [out]` in at least float32, `a [rank, in]`,
    `b [out, rank]`."""

    def __init__(
        self, m: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, through_norm: bool
    ) -> None:
        super().__init__()
        self.m, self.a, self.b = nn.Parameter(m), nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout, self.through_norm = scale, dropout, through_norm

    def branch(self, x: Tensor) -> Tensor:
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return low_rank(x, self.a, self.b, self.scale)

    def delta(self) -> Tensor:
        return (self.b @ self.a) * self.scale

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        random = self.dropout > 0 or self.features is not None
        return None if random else (self.a, self.b, self.scale)

    def rows(self, weight: Tensor) -> Tensor:
        factors = (weight, self.a, self.b)
        w, a, b = factors if self.through_norm else (t.detach() for t in factors)
        squares = squared_norms(w)
        w, a, b = (t.to(squares.dtype) for t in (w, a, b))
        with full_precision(w):
            crossed = (a @ w.mT).mT  # short axis first: 2 to 3 times faster on a CPU
            moved = torch.addmm(crossed, b, a @ a.mT, beta=2 * self.scale, alpha=self.scale**2)
        return self.m / root(squares + (moved * b).sum(1))

    def describe(self) -> str:
        return f"rank={self.a.shape[0]}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """Adapts the selected linears by a trainable row magnitude and a low-rank direction.

    Attributes:
        rank: of the direction's branch, at most min(in, out).
        alpha: numerator of the scale.
        dropout: probability on the branch's input, in training.
        rslora: scale by alpha / sqrt(rank).
        through_norm: let the gradient through the norm, too, at the cost of its backward.
        where: the paper adapts queries, keys, values and the feed-forward's up and down.
    """

    folds: ClassVar[str] = "exactly"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    through_norm: bool = False
    where: str = "q|k|v|ffn.up|ffn.down"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(math.isfinite(self.alpha), "alpha", "finite")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def insert(self, edit: Editor, site: LinearSite) -> None:
        limit = min(site.in_features, site.out_features)
        self.require(self.rank <= limit, "rank", f"at most {limit} at {site.id}")
        weight = edit.weight(site)
        a = torch.empty(self.rank, site.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=edit.generator)
        b = torch.zeros(site.out_features, self.rank)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        m = root(squared_norms(edit.matrix(site)))
        a, b = a.to(weight.device, weight.dtype), b.to(weight.device, weight.dtype)
        edit.rescale(site, DoRABranch(m, a, b, scale, self.dropout, self.through_norm))
