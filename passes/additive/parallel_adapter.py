"""Parallel adapter: `h <- h + s (U sigma(D z + b_D) + b_U)`, beside a sublayer that reads z.

He et al., ICLR 2022, arXiv:2110.04366. z is what the sublayer's first product reads (the residual
in a post-norm model, its norm in a pre-norm one), and the adapter has no skip connection of its
own. Beside attention, the update joins the heads in front of the output projection, as in the
authors' code, or what that gives (`joins=output`), as their figure can be read. D starts uniform
in +-1/sqrt(d), U at zero: the identity. s is a number (4 for generation, 2 for classification), or
learnt. MAM is `prefix_tuning{length=30,projection=800};parallel_adapter{bottleneck=512}`.
Not foldable, because of the non-linearity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.branches.bottleneck import BottleneckBranch
from ...rewriter.branches.branch import Axes
from ...rewriter.branches.input_shift import InputShift
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Bottleneck
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import AttentionSite, LinearSite, Site, SublayerSite


class HeadsBranch(InputShift):
    """A bottleneck whose update joins what the output projection reads."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[Axes] = {
        "inner.down": ("rank", "width"), "inner.down_bias": ("rank",),
        "inner.up": ("in", "rank"), "inner.up_bias": ("in",), "seen": ("...", "width"),
    }  # fmt: skip

    def __init__(self, inner: BottleneckBranch) -> None:
        super().__init__()
        self.inner = inner

    def shift(self, x: Tensor, seen: Tensor) -> Tensor:
        """`seen`: z, with the samples and tokens of x."""
        return self.inner.update(x, seen=seen)

    def units(self, z: Tensor) -> Tensor:
        """Of the bottleneck."""
        return self.inner.units(z)

    def describe(self) -> str:
        return self.inner.describe()


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """Puts a bottleneck adapter beside every selected sublayer.

    Attributes:
        bottleneck: inner width r.
        scale: s; none for a learnt number that starts at 1.
        activation: between the projections.
        biases: of both projections.
        reads: z is what the sublayer reads (`input`), or the residual also where that is normed
            first (`residual`), as in AdapterHub.
        joins: where the update of an attention's adapter is added: `heads` or `output`.
        dropout: of the activations, in training.
        init: `lora` (U is zero) or `bert` (both normal with deviation 0.02: not the identity).
    """

    folds: ClassVar[str] = "no: not linear"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("identity")

    bottleneck: int = 64
    scale: float | None = 4.0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    biases: bool = True
    reads: Literal["input", "residual"] = "input"
    joins: Literal["heads", "output"] = "heads"
    dropout: float = 0.0
    init: Literal["lora", "bert"] = "lora"
    where: str = "ffn and sublayer"

    def check(self) -> None:
        self.require(self.bottleneck >= 1, "bottleneck", "at least 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def promise(self) -> Contract:
        return self.contract if self.init == "lora" else Contract("trainable")

    def insert(self, edit: Editor, site: SublayerSite) -> None:
        heads = site.role == "attn" and self.joins == "heads"
        o = _projection(edit, site) if heads else None
        if heads and o is None:
            edit.skip(site, "its heads go through no projection. Choose joins=output")
            return
        seen = edit.operand(site, o) if self.reads == "input" else edit.input(site)
        if seen is None:
            return
        if o is None:
            edit.after(site, self.made(edit, site, site.width), seen=seen)
        else:
            edit.shift(o, HeadsBranch(self.made(edit, site, o.in_features)), seen=seen)

    def made(self, edit: Editor, site: SublayerSite, out: int) -> BottleneckBranch:
        """The branch for one site, freshly initialised."""
        down, up = torch.empty(self.bottleneck, site.width), torch.zeros(out, self.bottleneck)
        if self.init == "lora":
            bound = site.width**-0.5
            down.uniform_(-bound, bound, generator=edit.generator)
        else:
            for matrix in (down, up):
                matrix.normal_(0.0, 0.02, generator=edit.generator)
        scale = 1.0 if self.scale is None else self.scale
        factor = torch.ones(1) if self.scale is None else None
        sizes = (self.bottleneck, out)
        biases = tuple(torch.zeros(n) if self.biases else None for n in sizes)
        part = Bottleneck(
            "", down, up, biases[0], biases[1], self.activation, scale, factor, self.reads
        )
        branch = BottleneckBranch(part, edit.like(site))
        branch.inner_dropout = self.dropout
        return branch


def _projection(edit: Editor, site: SublayerSite) -> LinearSite | None:
    """The output projection of a sublayer's attention."""
    place = site.stream, site.layer, site.cross

    def here(other: Site) -> bool:
        attention = isinstance(other, AttentionSite)
        return attention and (other.stream, other.layer, other.cross) == place

    names = {s.o for s in edit.program.sites if isinstance(s, AttentionSite) and here(s)}
    found = [s for s in edit.program.sites if isinstance(s, LinearSite) and s.id in names]
    return found[0] if len(found) == 1 else None
