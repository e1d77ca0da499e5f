"""KronA: `W + s (A (x) B)` beside a linear, or `y + s (A (x) B) z` beside a block that reads z.

Edalati et al., ENLSP 2023, arXiv:2212.10650. A is `[a1, a2]`, B `[b1, b2]`, a1 b1 outputs and
a2 b2 inputs; the product is never built: with x as `[a2, b2]`, the update is `A x B^T`. B starts
uniform in +-1/sqrt(b2), A at zero: the identity. `form=block` is KronA^B, an adapter without
non-linearity parallel to the feed-forward block, and `form=residual` KronA^B_res, which adds
`s_res z` with a learnt s_res. Beside a weight it folds exactly; a block cannot take what goes
around its non-linearity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Delta, Serial
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.placing import of_kind
from ...rewriter.products.kronecker import kronecker
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import LinearSite, Site, SublayerSite
from ...rewriter.program.state import State


class KronADelta(Delta):
    """`s (A (x) B) x`; parameters `a [a1, a2]`, `b [b1, b2]`."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def branch(self, x: Tensor) -> Tensor:
        return kronecker(x, self.a, self.b) * self.scale

    def delta(self) -> Tensor:
        return torch.kron(self.a, self.b) * self.scale

    def describe(self) -> str:
        return _described(self.a, self.b)


class KronABranch(Serial):
    """`s (A (x) B) z + s_res z`, beside a sublayer; s_res `[1]` or none."""

    not_foldable = "it goes around the block's non-linearity"

    def __init__(self, a: Tensor, b: Tensor, scale: float, residual: Tensor | None) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale
        own = None if residual is None else nn.Parameter(residual)
        self.register_parameter("residual", own)
        self.residual: Tensor | None

    def update(self, h: Tensor, seen: Tensor) -> Tensor:
        """`seen`: z, of the shape of h."""
        z = self.features_last(seen)
        y = kronecker(z, self.a, self.b) * self.scale
        return y if self.residual is None else y + z * self.residual.to(z.dtype)

    def describe(self) -> str:
        return _described(self.a, self.b)


def _described(a: Tensor, b: Tensor) -> str:
    return f"{a.shape[0]}x{a.shape[1]} by {b.shape[0]}x{b.shape[1]}"


@dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """Adds a Kronecker product beside weights, or beside feed-forward blocks.

    Attributes:
        form: `weight` (KronA), `block` (KronA^B) or `residual` (KronA^B_res).
        a: sizes (a1, a2) of A; none for those near the square roots of outputs and inputs, with
            about as many numbers in A as in B: the fewest.
        scale: s.
        residual: s_res at the start; the paper does not say.
    """

    folds: ClassVar[str] = "exactly; not beside blocks"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "sublayer")
    contract: ClassVar[Contract] = Contract("identity")

    form: Literal["weight", "block", "residual"] = "weight"
    a: tuple[int, int] | None = None
    scale: float = 1.0
    residual: float = 0.0
    where: str = "q|v|ffn and sublayer"

    def check(self) -> None:
        self.require(self.a is None or min(self.a) >= 1, "a", "two sizes, at least 1")
        self.require(self.scale != 0, "scale", "another number than 0")

    def promise(self) -> Contract:
        moves = self.form == "residual" and self.residual
        return Contract("trainable") if moves else self.contract

    @property
    def kind(self) -> str:
        """What it stands beside."""
        return "linear" if self.form == "weight" else "sublayer"

    def sites(self, program: State) -> list[Site]:
        form = f"krona{{form={self.form}}}"
        return of_kind(program, super().sites(program), self.kind, form, self.where)

    def obstacle(self, site: LinearSite | SublayerSite) -> str:
        out, size = _sizes(site)
        if self.a is None or not (out % self.a[0] or size % self.a[1]):
            return ""
        return f"a={list(self.a)} does not divide its {out} outputs and {size} inputs"

    def insert(self, edit: Editor, site: LinearSite | SublayerSite) -> None:
        out, size = _sizes(site)
        rows, columns = self.a or (_divisor(out), size // _divisor(size))
        a, b = torch.zeros(rows, columns), torch.empty(out // rows, size // columns)
        bound = b.shape[1] ** -0.5
        b.uniform_(-bound, bound, generator=edit.generator)
        if isinstance(site, LinearSite):
            edit.add(site, KronADelta(a, b, self.scale).to(edit.like(site)))
            return
        seen = edit.operand(site)
        if seen is not None:
            residual = torch.full((1,), self.residual) if self.form == "residual" else None
            branch = KronABranch(a, b, self.scale, residual)
            edit.after(site, branch.to(edit.like(site)), seen=seen)


def _sizes(site: LinearSite | SublayerSite) -> tuple[int, int]:
    """(outputs, inputs) of the product."""
    if isinstance(site, LinearSite):
        return site.out_features, site.in_features
    return site.width, site.width


def _divisor(size: int) -> int:
    """The largest divisor up to the square root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
