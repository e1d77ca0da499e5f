"""Low-rank changes whose factors are made of tensors that all of an adapter's parts share.

They are `LowRank` to whoever knows no more, and their own fields say how it came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .parts import LowRank, Part


@dataclass(frozen=True)
class Vera(LowRank):
    """`a = diag(d) down[:, :in]`, `b = diag(vector) up[:out]` (VeRA).

    Attributes:
        d, vector: `[rank]`, `[out]`.
        down, up: `[rank, widest in]`, `[widest out, rank]`, the same of all parts.
    """

    d: Tensor | None = None
    vector: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def whole(self) -> bool:
        """Whether the factors still are what the shared tensors make."""
        if self.d is None or self.vector is None or self.down is None or self.up is None:
            return False
        a, b = vera_factors(self.d, self.vector, self.down, self.up, self.a.shape[-1])
        same = self.a.shape == a.shape and self.b.shape == b.shape and self.scale == 1
        return same and torch.equal(self.a, a) and torch.equal(self.b, b)


def vera_factors(
    d: Tensor, vector: Tensor, down: Tensor, up: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """(a, b) of a weight of that many inputs."""
    return d[:, None] * down[:, :width], vector[:, None] * up[: len(vector)]


def vera(
    target: str, d: Tensor, vector: Tensor, down: Tensor, up: Tensor, width: int, dropout: float
) -> Vera:
    """The part of a weight of that many inputs."""
    a, b = vera_factors(d, vector, down, up, width)
    return Vera(target, a, b, 1.0, None, False, dropout, d=d, vector=vector, down=down, up=up)


def unshared(part: LowRank) -> LowRank:
    """The same without what is shared."""
    return LowRank(**{f.name: getattr(part, f.name) for f in fields(LowRank)})


def shared(parts: Sequence[Part], names: Sequence[str]) -> bool:
    """Whether all parts have the same tensors of these names."""
    first = [getattr(parts[0], n, None) for n in names]
    return all(
        isinstance(one, Tensor) and isinstance(mine := getattr(p, n, None), Tensor)
        and (one is mine or (one.shape == mine.shape and torch.equal(one, mine)))
        for p in parts for n, one in zip(names, first, strict=True)
    )  # fmt: skip
