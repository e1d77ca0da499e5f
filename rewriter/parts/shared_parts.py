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


@dataclass(frozen=True)
class Mixture(LowRank):
    """Pieces of a and b are mixtures of the vectors of a bank (VB-LoRA), see `mixtures`.

    Attributes:
        logits_a, logits_b: `[rank, in / l, h]`, `[out / l, rank, h]`, or the k largest of each.
        places_a, places_b: which vectors these are of, integers `[..., k]`; None: of all.
        bank: `[h, l]`, the same of all parts.
        topk: k.
    """

    logits_a: Tensor | None = None
    logits_b: Tensor | None = None
    places_a: Tensor | None = None
    places_b: Tensor | None = None
    bank: Tensor | None = None
    topk: int = 0

    def whole(self) -> bool:
        """Whether the factors still are what the bank makes."""
        if self.logits_a is None or self.logits_b is None or self.bank is None:
            return False
        places = None if self.places_a is None or self.places_b is None else (
            self.places_a, self.places_b
        )  # fmt: skip
        logits = self.logits_a, self.logits_b
        own = bank_part("", logits, places, self.bank, self.topk, 0.0)
        same = self.a.shape == own.a.shape and self.b.shape == own.b.shape and self.scale == 1
        return same and torch.equal(self.a, own.a) and torch.equal(self.b, own.b)


def mixtures(logits: Tensor, places: Tensor | None, bank: Tensor, topk: int) -> Tensor:
    """`sum_i softmax(top)_i bank_i` over the k largest logits, `[..., l]`; of given places over
    the logits of those."""
    top, index = logits.topk(topk) if places is None else (logits, places.long())
    return (top.softmax(-1).unsqueeze(-1) * bank[index]).sum(-2)


def bank_part(
    target: str, logits: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor] | None, bank: Tensor,
    topk: int, dropout: float,
) -> Mixture:  # fmt: skip
    """The part of a weight."""
    places_a, places_b = places or (None, None)
    a = mixtures(logits[0], places_a, bank, topk).flatten(1)
    b = mixtures(logits[1], places_b, bank, topk).mT.flatten(0, 1)
    return Mixture(
        target, a, b, 1.0, None, False, dropout, logits_a=logits[0], logits_b=logits[1],
        places_a=places_a, places_b=places_b, bank=bank, topk=topk,
    )  # fmt: skip
