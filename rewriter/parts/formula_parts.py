"""Parts that change a weight by a formula: products, and rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..products.hadamard import hadamard
from ..products.rotations import butterfly, cayley, places, series, side, skew, turned, within
from .parts import Part


@dataclass(frozen=True)
class Formula(Part):
    """`W + change(W)` of the tensors that a method here trains; fields are called as in its branch.

    Attributes:
        method: its name.
        of_numbers: the change depends on the numbers of the weight, not on its sizes alone.
    """

    method: ClassVar[str] = ""
    of_numbers: ClassVar[bool] = False

    def change(self, weight: Tensor) -> Tensor:
        """The change of a weight `[count * out, in]`, in its dtype; where it is not `of_numbers`,
        any tensor of that dtype will do."""
        raise NotImplementedError

    def fits(self, out: int, size: int) -> bool:
        """Whether a weight `[out, size]` has such a change."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hadamard(Formula):
    """`W + scale (w1_a w1_b) o (w2_a w2_b)`.

    Attributes:
        w1_a, w2_a: `[count * out, rank]`, or of experts `[count, out, rank]`.
        w1_b, w2_b: `[rank, in]`, or `[count, rank, in]`.
    """

    method = "loha"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0

    def change(self, weight: Tensor) -> Tensor:
        factors = (t.to(weight) for t in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        return hadamard(*factors).reshape(-1, self.w1_b.shape[-1]) * self.scale

    def fits(self, out: int, size: int) -> bool:
        products = ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b))
        whole = all(a.shape[-1] == b.shape[-2] and b.shape[-1] == size for a, b in products)
        return whole and all(a[..., 0].numel() == out for a, _ in products)


KRONECKER = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
"""The tensors of a Kronecker product: each factor whole, or the two of its own."""


@dataclass(frozen=True)
class Kronecker(Formula):
    """`W + scale (w1 (x) w2)`, where a factor is whole or `w_a w_b`.

    Attributes:
        w1: `[o1, i1]`, or `w1_a [o1, rank]` and `w1_b [rank, i1]`.
        w2: `[o2, i2]`, of a convolution `[o2, i2 * kernel]`.
        rank: that was asked for.
    """

    method = "lokr"

    scale: float = 1.0
    rank: int = 1
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that it has."""
        own = {name: getattr(self, name) for name in KRONECKER}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def factor(self, name: str, like: Tensor) -> Tensor:
        """`w1` or `w2`.

        Raises:
            KeyError: it is missing.
        """
        own = self.tensors()
        if name in own:
            return own[name].to(like)
        return own[f"{name}_a"].to(like) @ own[f"{name}_b"].to(like)

    def change(self, weight: Tensor) -> Tensor:
        one, two = (self.factor(n, weight) for n in ("w1", "w2"))
        return torch.kron(one * self.scale, two.contiguous())

    def fits(self, out: int, size: int) -> bool:
        like = torch.empty(0)
        one, two = (self.factor(n, like).shape for n in ("w1", "w2"))
        return (one[0] * two[0], one[1] * two[1]) == (out, size)


@dataclass(frozen=True)
class Rotation(Formula):
    """`W R^T`, R of blocks: Cayley's map of skew matrices, or the first terms of a series.

    Attributes:
        q: the numbers above the diagonals, `[blocks, size (size - 1) / 2]`.
        share: the one block is of all features alike.
        terms: of the series, 0 for Cayley's map.
        eps: how far training lets it go from the identity, 0 for anywhere.
    """

    method = "oft"
    of_numbers = True

    q: Tensor
    share: bool = False
    terms: int = 0
    eps: float = 0.0

    @property
    def size(self) -> int:
        """Of a block."""
        return side(self.q.shape[1])

    def change(self, weight: Tensor) -> Tensor:
        q = self.q.to(weight)
        q = within(q, self.eps) if self.eps else q
        q = skew(q, places(self.size).to(weight.device))
        r = series(q, self.terms) if self.terms else cayley(q)
        return turned(weight, r.mT) - weight

    def fits(self, out: int, size: int) -> bool:
        whole = size % self.size == 0 and self.size > 1
        return whole and (self.share or len(self.q) * self.size == size)


@dataclass(frozen=True)
class Butterfly(Formula):
    """`diag(s) W M^T`, M a butterfly of Cayley's maps.

    Attributes:
        blocks: `[factors, blocks, size, size]`, of which the skew parts count; None where only
            rows are scaled.
        s: `[out]`, or None for ones.
    """

    method = "boft"
    of_numbers = True

    blocks: Tensor | None = None
    s: Tensor | None = None

    def change(self, weight: Tensor) -> Tensor:
        moved = weight
        if self.blocks is not None:
            own = self.blocks.to(weight)
            moved = butterfly(moved, cayley((own - own.mT) / 2), back=True)
        return (moved if self.s is None else self.s.to(weight)[:, None] * moved) - weight

    def fits(self, out: int, size: int) -> bool:
        if self.s is not None and len(self.s) != out:
            return False
        if self.blocks is None:
            return True
        factors, count, own, _ = self.blocks.shape
        parted = factors == 1 or (own % 2 == 0 and size % (own * 2 ** (factors - 1)) == 0)
        return count * own == size and parted
