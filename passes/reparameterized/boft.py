"""BOFT: `y = diag(s) W M^T x + b`, M the product of butterfly factors, which are orthogonal.

Liu et al., ICLR 2024, arXiv:2311.06243. Factor i is a block-diagonal rotation of features that lie
`2^i block / 2` apart, so that few small blocks reach all features: `M = F_m ... F_1`, each
`P^T R P` with Cayley's map R of the skew part of what trains. R begins as the identity and s as
ones, so step 0 is the base model. Inputs turn, factor by factor; M is never built. Folds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, RowScale
from ...rewriter.branches.input_map import InputMap
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.parts.formula_parts import Butterfly
from ...rewriter.parts.parts import Part
from ...rewriter.pipeline.aliases import PLACES, Alias, instead, renamed, started_by
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Saved
from ...rewriter.products.rotations import butterfly, cayley
from ...rewriter.program.sites import WeightSite


class BOFTBranch(InputMap):
    """Parameter `blocks [factors, blocks, size, size]`."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.blocks = nn.Parameter(blocks)

    def rotations(self) -> Tensor:
        """R of all factors."""
        return cayley((self.blocks - self.blocks.mT) / 2)

    def mapped(self, x: Tensor) -> Tensor:
        return butterfly(x, self.rotations())

    def adjoint(self, rows: Tensor) -> Tensor:
        return butterfly(rows, self.rotations(), back=True)

    def part(self) -> Part:
        return Butterfly("", self.blocks.detach())

    def describe(self) -> str:
        factors, count, size, _ = self.blocks.shape
        return f"{factors} factors of {count} blocks of {size}"


class BOFTRows(RowScale):
    """Scales the rows of the weight; parameter `s [count * out]`."""

    axes: ClassVar[Axes] = {"s": ("out",)}

    def __init__(self, s: Tensor, inputs: int) -> None:
        super().__init__()
        self.s, self.inputs = nn.Parameter(s), inputs

    def rows(self, weight: Tensor) -> Tensor:
        return self.s

    def branch(self, x: Tensor, **operands: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(self.s))  # nothing is added to the rows

    def delta(self) -> Tensor:
        return self.s.new_zeros(len(self.s), self.inputs)

    def forward(
        self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, **reads: Tensor
    ) -> Tensor:
        own, s = self.features_last(y), self.spread(self.s, 1.0)
        c = self.shape.along(s, own, **reads)
        if bias is None:
            return self.features_back((own * c).to(y.dtype))
        rest = self.shape.along((1 - s) * bias, own, **reads)
        return self.features_back(torch.addcmul(rest, own, c).to(y.dtype))

    def part(self) -> Part:
        return Butterfly("", s=self.s.detach())


@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """Turns what every selected weight reads by a butterfly of rotations, and scales its rows.

    Of a convolution the patch turns, beside experts the inputs of all alike; these, and parts of a
    fused weight, compute the turned weight anew, which then costs as much as a gradient of it.

    Attributes:
        block: size of a block.
        blocks: their number, in place of a size; 0 for none.
        factors: of the butterfly; sites whose inputs are no multiple of `2^(factors - 1) block`
            are skipped.
        where: the paper adapts the attention's projections.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "experts")
    aliases: ClassVar[Mapping[str, Alias]] = PLACES | {
        **renamed(boft_block_size="block", boft_block_num="blocks"),
        **renamed(boft_n_butterfly_factor="factors"),
        "init_weights": started_by(),
        "boft_dropout": instead("leave it out", 0.0, 0),
    }

    block: int = 4
    blocks: int = 0
    factors: int = 1
    where: str = "q|k|v|o"

    def check(self) -> None:
        self.require(self.block >= 2 or self.blocks > 0, "block", "at least 2")
        self.require(self.blocks >= 0, "blocks", "at least 0")
        self.require(self.factors >= 1, "factors", "at least 1")
        even = self.factors == 1 or self.blocks > 0 or self.block % 2 == 0
        self.require(even, "block", "even with several factors")

    def obstacle(self, site: WeightSite) -> str:
        inputs = site.matrices[2]
        size = inputs // self.blocks if self.blocks else self.block
        whole = size > 1 and inputs % (size * 2 ** (self.factors - 1)) == 0
        whole = whole and (self.factors == 1 or size % 2 == 0) and inputs % (self.blocks or 1) == 0
        said = f"blocks={self.blocks}" if self.blocks else f"block={self.block}"
        return "" if whole else f"factors={self.factors} with {said} do not fit {inputs} inputs"

    def insert(self, edit: Editor, site: WeightSite) -> None:
        if reason := self.obstacle(site):
            raise PassError(
                f"{self.text}: {site.id}: {reason}. The plan was altered: save the adapter again."
            )
        count, out, inputs = site.matrices
        size = inputs // self.blocks if self.blocks else self.block
        like = edit.like(site)
        turn = BOFTBranch(torch.zeros(self.factors, inputs // size, size, size))
        edit.map(site, turn.to(like))
        edit.rescale(site, BOFTRows(torch.ones(count * out), inputs).to(like))

    def saved_part(self, saved: Saved) -> Part | None:
        return None
