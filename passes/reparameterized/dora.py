"""DoRA: `y = c * (W x + s B A drop(x)) + b`, `c = m / ||V||_row`, `V = W + s B A`.

Liu et al., ICML 2024, arXiv:2402.09353. The magnitude `m [out]` of every row of W trains apart from
its direction V. m starts as the row norms of W and B as zero, so that c is exactly one and step 0
is the base model. The norm counts as a constant in the gradient, as in section 4.3 of the paper.
It is computed without B A, in at least float32 (rounding it moves c by more than a typical delta):

    ||V_i||^2 = ||W_i||^2 + sum_j (2 s W A^T + s^2 B A A^T)_ij B_ij

Folds exactly: `diag(c) (W + s B A)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import RowScale
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import LowRank, Part
from ...rewriter.pipeline.aliases import Alias
from ...rewriter.program.sites import WeightSite
from .initial_factors import require_random
from .lora import LoRA, LoRABranch


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
    """Magnitude and low-rank direction; `m [out]` in at least float32, and a LoRA's parameters."""

    def __init__(self, m: Tensor, direction: LoRABranch, through_norm: bool) -> None:
        super().__init__()
        self.m, self.a, self.b = nn.Parameter(m), direction.a, direction.b
        self.scale, self.dropout = direction.scale, direction.dropout
        self.through_norm = through_norm

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        return self.shape.low_rank(self.dropped(x), self.a, self.b, self.scale, **operands)

    def delta(self) -> Tensor:
        return self.shape.product(self.b, self.a) * self.scale

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.a, self.b, self.scale) if self.at_linear else None

    def rows(self, weight: Tensor) -> Tensor:
        factors = (weight, self.a, self.b)
        w, a, b = factors if self.through_norm else (t.detach() for t in factors)
        squares = squared_norms(w)
        w, a, b = (t.to(squares.dtype) for t in (w, a, b))
        with full_precision(w):
            w = w if a.dim() == 2 else w.unflatten(0, (len(a), -1))
            crossed = (a @ w.mT).mT  # short axis first: 2 to 3 times faster on a CPU
            product = torch.addmm if a.dim() == 2 else torch.baddbmm
            moved = product(crossed, b, a @ a.mT, beta=2 * self.scale, alpha=self.scale**2)
        return self.m / root(squares + (moved * b).sum(-1).flatten())

    def part(self) -> Part:
        factors = self.a.detach(), self.b.detach()
        return LowRank("", *factors, self.scale, self.m.detach(), dropout=self.dropout)

    def describe(self) -> str:
        return f"rank={self.a.shape[-2]}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Adapts the selected weights by a trainable row magnitude and a low-rank direction.

    A row is what makes one output: a channel of a convolution, an output of an expert; of an
    embedding, one number of all its vectors.

    Attributes:
        through_norm: let the gradient through the norm, too, at the cost of its backward.
        where: the paper adapts queries, keys, values and the feed-forward's up and down.
    """

    aliases: ClassVar[Mapping[str, Alias]] = {
        **LoRA.aliases,
        "use_dora": lambda value: {} if value else "write lora{...} in place of dora{...}",
    }

    through_norm: bool = False
    where: str = "q|k|v|ffn.up|ffn.down"

    def check(self) -> None:
        super().check()
        require_random(self)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        m = root(squared_norms(edit.matrix(site)))
        edit.rescale(site, DoRABranch(m, self.made(edit, site), self.through_norm))
