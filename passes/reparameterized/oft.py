"""OFT: `y = W R^T x + b`, R orthogonal and block-diagonal: weights turn, and keep their angles.

Qiu et al., NeurIPS 2023, arXiv:2306.07280. Each block is Cayley's map of a skew matrix Q, of which
the numbers above the diagonal train: `R = (1 - Q)(1 + Q)^-1`, in float32 at least. Q is zero, so
step 0 is the base model. As in PEFT it is the inputs that turn, which costs less than turning W.
`coft` keeps each Q within `eps / sqrt(blocks)` of zero, `share` has one block for all, and `series`
takes the first terms of one for R^T, which is no rotation once Q is large (Qiu et al. 2025,
arXiv:2506.19847). Folds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.input_map import InputMap
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.formula_parts import Rotation
from ...rewriter.parts.parts import Part
from ...rewriter.pipeline.aliases import PLACES, Alias, instead, renamed, started_by
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Saved
from ...rewriter.products.rotations import cayley, places, series, skew, turned, within
from ...rewriter.program.sites import WeightSite


class OFTBranch(InputMap):
    """Parameter `q [blocks, size (size - 1) / 2]`; one block with `share`."""

    index: Tensor

    def __init__(self, q: Tensor, size: int, share: bool, terms: int, eps: float) -> None:
        super().__init__()
        self.q, self.size = nn.Parameter(q), size
        self.share, self.terms, self.eps = share, terms, eps
        self.register_buffer("index", places(size), persistent=False)

    def rotation(self) -> Tensor:
        """R, `[blocks, size, size]`."""
        q = skew(within(self.q, self.eps) if self.eps else self.q, self.index)
        return series(q, self.terms) if self.terms else cayley(q)

    def mapped(self, x: Tensor) -> Tensor:
        return turned(x, self.rotation())

    def adjoint(self, rows: Tensor) -> Tensor:
        return turned(rows, self.rotation().mT)

    def part(self) -> Part:
        return Rotation("", self.q.detach(), self.share, self.terms, self.eps)

    def describe(self) -> str:
        return f"{'shared ' if self.share else ''}blocks of {self.size}"


class Within(Controller):
    """Keeps what trains within its distance of zero, as the forward pass does."""

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        super().after_step(step)
        for _, branch in self.branches():
            own = getattr(branch, "map", branch)
            if own.eps:
                own.q.copy_(within(own.q, own.eps))


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Turns what every selected weight reads by a block-diagonal rotation.

    Of a convolution the patch turns, beside experts the inputs of all alike; these, and parts of a
    fused weight, compute the turned weight anew, which then costs as much as a gradient of it.

    Attributes:
        block: size of a block; where it does not divide the inputs, the nearest that does.
        blocks: their number, in place of a size; 0 for none.
        coft: keep Q near zero.
        eps: how near, see `coft`.
        share: one block for all features.
        series: the first terms of a series in place of the exact map.
        terms: of the series, at least 2.
        where: the paper adapts the attention's projections.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "experts")
    controller: ClassVar[type[Controller]] = Within
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(oft_block_size="block", r="blocks", block_share="share"),
        "init_weights": started_by(),
        "module_dropout": instead("leave it out", 0.0, 0),
        **renamed(use_cayley_neumann="series", num_cayley_neumann_terms="terms"),
    }

    block: int = 32
    blocks: int = 0
    coft: bool = False
    eps: float = 6e-5
    share: bool = False
    series: bool = False
    terms: int = 5
    where: str = "q|k|v|o"

    def check(self) -> None:
        self.require(self.block >= 2 or self.blocks > 0, "block", "at least 2")
        self.require(self.blocks >= 0, "blocks", "at least 0")
        self.require(self.eps > 0, "eps", "above 0")
        self.require(2 <= self.terms <= 100, "terms", "2 to 100")

    def obstacle(self, site: WeightSite) -> str:
        size = self.size(site.matrices[2])
        return "" if size > 1 else f"blocks of one of its {site.matrices[2]} inputs cannot turn"

    @property
    def form(self) -> tuple[bool, int, float]:
        """`share`, `terms` and `eps` of a `Rotation`."""
        return self.share, self.terms if self.series else 0, self.eps if self.coft else 0.0

    def size(self, inputs: int) -> int:
        """Of the blocks of a weight."""
        if self.blocks:
            return inputs // nearest_divisor(inputs, self.blocks)
        return nearest_divisor(inputs, self.block)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        inputs = site.matrices[2]
        size = self.size(inputs)
        q = torch.zeros(1 if self.share else inputs // size, size * (size - 1) // 2)
        edit.map(site, OFTBranch(q, size, *self.form).to(edit.like(site)))

    def saved_part(self, saved: Saved) -> Part | None:
        q = saved.tensors.get("q")
        if q is None or saved.slot != InputMap.slot:
            return None
        return Rotation(saved.target, q, *self.form)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is nearest to what is wanted, the smaller one of two."""
    divisors: Any = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d))
