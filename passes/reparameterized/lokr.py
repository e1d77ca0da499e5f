"""LoKr: `W + s (C1 (x) C2)`, a Kronecker product whose factors may be of low rank.

Yeh et al., ICLR 2024, arXiv:2309.14859 (LyCORIS). C1 is `[o1, i1]`, C2 `[o2, i2]`, with `o1 o2`
outputs and `i1 i2` inputs; C2 is `A B` of the given rank where that is less than half its longer
side, C1 only with `decompose_both`. `s = alpha / rank`. C1 is zero (or the A of it), the rest
Kaiming uniform; with `init=lycoris`, C2 (or its B) is zero instead: step 0 is the base model.
Beside a linear the product is never built (`kronecker`). Folds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.formula_parts import KRONECKER, Kronecker
from ...rewriter.parts.parts import Part
from ...rewriter.pipeline.aliases import PLACES, Alias, by_pattern, instead, renamed, started_by
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.options import BySite
from ...rewriter.pipeline.passes import Saved
from ...rewriter.products.kronecker import kronecker
from ...rewriter.program.sites import WeightSite


class LoKrBranch(Delta):
    """Parameters `w1 [o1, i1]` or `w1_a [o1, rank]`, `w1_b [rank, i1]`; the same of `w2`."""

    def __init__(self, tensors: Mapping[str, Tensor], scale: float, rank: int) -> None:
        super().__init__()
        self.scale, self.rank = scale, rank
        for name in KRONECKER:
            own = tensors.get(name)
            self.register_parameter(name, None if own is None else nn.Parameter(own))

    def _factor(self, name: str) -> Tensor:
        whole = getattr(self, name)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b") if whole is None else whole

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        if self.at_linear:
            return kronecker(x, self._factor("w1") * self.scale, self._factor("w2"))
        delta, count = self.delta(), self.shape.count
        delta = delta if count == 1 else delta.unflatten(0, (count, -1))
        return self.shape.narrow(x, delta, **operands)

    def delta(self) -> Tensor:
        return torch.kron(self._factor("w1") * self.scale, self._factor("w2"))

    def part(self) -> Part | None:
        if self.features is not None:
            return None  # rows of a fused weight are no Kronecker product of it
        own = {n: p.detach() for n, p in self.named_parameters()}
        return Kronecker("", scale=self.scale, rank=self.rank, **own)

    def describe(self) -> str:
        (o1, i1), (o2, i2) = (self._factor(n).shape for n in ("w1", "w2"))
        return f"{o1}x{i1} by {o2}x{i2}, scale={self.scale:g}"


def divided(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size: `factor` first where it divides, else the largest divisor below it
    that is no more than the square root; -1: the largest such."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(d for d in range(most, 0, -1) if size % d == 0)
    return small, size // small


@dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """Adds a Kronecker product, maybe of low-rank factors, to every selected weight.

    Beside a convolution C2 is of its channels and places, and all groups read the same channels.

    Attributes:
        rank: of factors that are products; they are whole where it is half their longer side.
            By site, as of `lora`.
        alpha: numerator of the scale `alpha / rank`; by site, too.
        factor: size of C1, where it divides; -1: the nearest to the square root.
        decompose_both: C1 may be a product, too.
        init: `kaiming` (C1 is zero) or `lycoris` (C2 is).
        where: queries and values, as LoRA.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv",)
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(r="rank", decompose_factor="factor"),
        "rank_pattern": by_pattern("rank"),
        "alpha_pattern": by_pattern("alpha"),
        "init_weights": started_by("init", "kaiming"),
        "use_effective_conv2d": instead("a product with a core is read by load_peft, not trained"),
        "rank_dropout_scale": lambda value: {},
        **dict.fromkeys(("rank_dropout", "module_dropout"), instead("leave it out", 0.0, 0)),
    }

    rank: BySite[int] = 8
    alpha: BySite[float] = 8.0
    factor: int = -1
    decompose_both: bool = False
    init: Literal["kaiming", "lycoris"] = "kaiming"
    where: str = "q|v"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(math.isfinite(self.alpha) and self.alpha != 0, "alpha", "finite and not 0")
        self.require(self.factor == -1 or self.factor >= 1, "factor", "-1, or at least 1")

    def insert(self, edit: Editor, site: WeightSite) -> None:
        count, out, size = site.matrices
        kernel = math.prod(getattr(site, "kernel", ()))
        (o1, o2), (i1, i2) = (divided(n, self.factor) for n in (count * out, size // kernel))
        products = self.decompose_both and 2 * self.rank < max(o1, i1), 2 * self.rank < max(o2, i2)
        tensors: dict[str, Tensor] = {}
        sizes = ((o1, i1), (o2, i2 * kernel))
        for name, (rows, columns), product in zip(("w1", "w2"), sizes, products, strict=True):
            zero = name == ("w1" if self.init == "kaiming" else "w2")
            shapes = {name: (rows, columns)}
            if product:
                shapes = {f"{name}_a": (rows, self.rank), f"{name}_b": (self.rank, columns)}
            nothing = f"{name}_{'a' if name == 'w1' else 'b'}" if product else name
            for own, shape in shapes.items():
                bound = (
                    0.0 if zero and own == nothing else shape[1] ** -0.5
                )  # Kaiming's, a = sqrt 5
                tensors[own] = torch.empty(shape).uniform_(-bound, bound, generator=edit.generator)
        branch = LoKrBranch(tensors, self.alpha / self.rank, self.rank)
        edit.add(site, branch.to(edit.like(site)))

    def saved_part(self, saved: Saved) -> Part | None:
        own = {n: t for n, t in saved.tensors.items() if n in KRONECKER}
        rank = self.rank
        return Kronecker(saved.target, scale=self.alpha / rank, rank=rank, **own) if own else None
