"""LoHa: `W + s (A1 B1) o (A2 B2)`, the entries' product of two low-rank matrices, of rank r^2.

Hyeon-Woo et al., ICLR 2022, arXiv:2108.06098 (FedPara); as an adapter in LyCORIS (Yeh et al., ICLR
2024, arXiv:2309.14859). A is `[out, r]`, B `[r, in]`, `s = alpha / r`. B2 is zero, so step 0 is the
base model; the others are Kaiming uniform, or with `init=lycoris` normal, of deviation 0.1 (A1) and
1. Folds exactly.

Row by row, the product's factors are A1 and A2's products of all pairs of columns, `[out, r^2]`,
and those of the rows of B1 and B2: where `r^2 (in + out) < in out`, the call goes through them.
Else the matrix is built, and in backward built again instead of kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.formula_parts import Hadamard
from ...rewriter.parts.parts import Part
from ...rewriter.pipeline.aliases import PLACES, Alias, by_pattern, instead, renamed, started_by
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.options import BySite
from ...rewriter.pipeline.passes import Saved
from ...rewriter.products.hadamard import hadamard, pairs
from ...rewriter.program.sites import WeightSite


class LoHaBranch(Delta):
    """Parameters `w1_a`, `w2_a` `[count * out, rank]`, `w1_b`, `w2_b` `[rank, in]`; beside experts
    `[count, out, rank]` and `[count, rank, in]`."""

    axes: ClassVar[Axes] = {
        f"w{i}_{side}": (("out", "rank") if side == "a" else ("rank", "in"))
        for i in (1, 2) for side in "ab"
    }  # fmt: skip

    def __init__(self, factors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (
            nn.Parameter(factors[name]) for name in self.axes
        )
        self.scale = scale

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        if self._small:
            a, b = self._pair()
            return self.shape.low_rank(x, a, b, self.scale, **operands)
        return self.shape.narrow(x, self._stack(self.delta()), **operands)

    def delta(self) -> Tensor:
        product = hadamard(self.w1_a, self.w1_b, self.w2_a, self.w2_b) * self.scale
        return product if product.dim() == 2 else product.flatten(0, 1)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (*self._pair(), self.scale) if self.at_linear and self._small else None

    def part(self) -> Part:
        one, b1, two, b2 = (getattr(self, n).detach() for n in self.axes)
        return Hadamard("", self.spread(one, 0.0), b1, self.spread(two, 0.0), b2, self.scale)

    def describe(self) -> str:
        return f"rank={self.w1_b.shape[-2]}, scale={self.scale:g}"

    @property
    def _small(self) -> bool:
        """Whether a call through its factors multiplies less."""
        out, (rank, size) = self.w1_a.shape[-2], self.w1_b.shape[-2:]
        out = out if self.w1_a.dim() == 3 else out // self.shape.count
        return rank * rank * (out + size) < out * size

    def _pair(self) -> tuple[Tensor, Tensor]:
        """`a [r^2, in]` and `b [out, r^2]`, see `shapes`."""
        a, b = pairs(self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        if self.shape.count > 1 and a.dim() == 2:
            return a.expand(self.shape.count, -1, -1), self._stack(b)
        return a, b

    def _stack(self, matrix: Tensor) -> Tensor:
        """`[count * out, ...]` as `[count, out, ...]`."""
        count = self.shape.count
        return matrix if count == 1 else matrix.unflatten(0, (count, -1))


@dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """Adds the entries' product of two low-rank matrices to every selected weight.

    Beside a convolution B is of a patch, and one for all groups; beside experts, each has factors
    of its own.

    Attributes:
        rank: of each of the two; their product has its square. By site, as of `lora`.
        alpha: numerator of the scale `alpha / rank`; by site, too.
        init: `kaiming`, or `lycoris`: normal.
        where: the paper replaces all weights; queries and values as LoRA.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "experts")
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(r="rank"),
        "rank_pattern": by_pattern("rank"),
        "alpha_pattern": by_pattern("alpha"),
        "init_weights": started_by("init", "kaiming"),
        "use_effective_conv2d": instead("a product with a core is read by load_peft, not trained"),
        **dict.fromkeys(("rank_dropout", "module_dropout"), instead("leave it out", 0.0, 0)),
    }

    rank: BySite[int] = 8
    alpha: BySite[float] = 8.0
    init: Literal["kaiming", "lycoris"] = "kaiming"
    where: str = "q|v"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(math.isfinite(self.alpha) and self.alpha != 0, "alpha", "finite and not 0")

    def obstacle(self, site: WeightSite) -> str:
        count, out, size = site.matrices
        out = out if site.kind == "experts" else count * out
        small = self.rank <= min(out, size)
        return "" if small else f"rank={self.rank} exceeds its size {out} x {size}"

    def insert(self, edit: Editor, site: WeightSite) -> None:
        count, out, size = site.matrices
        lead = (count,) if site.kind == "experts" else ()
        rows = out if lead else count * out
        factors: dict[str, Tensor] = {}
        for name, std in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_a", 1.0)):
            shape = (rows, self.rank) if name.endswith("a") else (self.rank, size)
            tensor = torch.empty(*lead, *shape)
            bound = 0.0 if self.init == "lycoris" else shape[1] ** -0.5  # Kaiming's, a = sqrt 5
            factors[name] = (
                tensor.uniform_(-bound, bound, generator=edit.generator)
                if bound
                else tensor.normal_(std=std, generator=edit.generator)
            )
        factors["w2_b"] = torch.zeros(*lead, self.rank, size)
        edit.add(site, LoHaBranch(factors, self.alpha / self.rank).to(edit.like(site)))

    def saved_part(self, saved: Saved) -> Part | None:
        tensors = [saved.tensors.get(name) for name in LoHaBranch.axes]
        known = [t for t in tensors if t is not None]
        scale = self.alpha / self.rank
        return Hadamard(saved.target, *known, scale=scale) if len(known) == len(tensors) else None
