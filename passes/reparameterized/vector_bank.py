"""A bank of vectors, and low-rank branches whose pieces are mixtures of it (see `vb_lora`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Delta
from ...rewriter.parts.parts import Part
from ...rewriter.parts.shared_parts import bank_part, mixtures


class Bank(nn.Module):
    """`forward() -> vectors [h, l]`."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> Tensor:
        return self.vectors


class VBLoRABranch(Delta):
    """Parameters `logits_a [rank, in / l, h]` and `logits_b [out / l, rank, h]`; or, baked, those
    of the k vectors that `places_a` and `places_b` name, `[..., k]`."""

    places_a: Tensor | None
    places_b: Tensor | None

    def __init__(
        self, logits: tuple[Tensor, Tensor], topk: int, dropout: float,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.logits_a, self.logits_b = map(nn.Parameter, logits)
        self.topk, self.dropout = topk, dropout
        for name, place in zip(("places_a", "places_b"), places or (None, None), strict=True):
            self.register_buffer(name, place, persistent=False)

    def _factors(self, bank: Tensor) -> tuple[Tensor, Tensor]:
        """a `[rank, in]`, b `[out, rank]`."""
        a = mixtures(self.logits_a, self.places_a, bank, self.topk)
        b = mixtures(self.logits_b, self.places_b, bank, self.topk)
        return a.flatten(1), b.mT.flatten(0, 1)

    def branch(self, x: Tensor, bank: Tensor) -> Tensor:
        return self.shape.low_rank(self.dropped(x), *self._factors(bank), 1.0)

    def delta(self, bank: Tensor) -> Tensor:
        a, b = self._factors(bank)
        return self.shape.product(b, a)

    def largest(self) -> dict[str, Tensor]:
        """The places of the k largest logits, as small integers; of a baked branch none."""
        if self.places_a is not None:
            return {}
        count = self.logits_a.shape[-1]
        dtype = torch.uint8 if count <= 256 else torch.int16 if count <= 1 << 15 else torch.int32
        logits = {"places_a": self.logits_a, "places_b": self.logits_b}
        return {n: t.detach().topk(self.topk).indices.to(dtype) for n, t in logits.items()}

    def settled(self, **decided: Any) -> VBLoRABranch:
        places: tuple[Tensor, ...] = decided["places_a"], decided["places_b"]
        kept = [
            t.detach().gather(-1, p.to(t.device, torch.int64))
            for t, p in zip((self.logits_a, self.logits_b), places, strict=True)
        ]
        own = [p if t.is_meta else p.to(t.device) for t, p in zip(kept, places, strict=True)]
        return VBLoRABranch((kept[0], kept[1]), self.topk, self.dropout, (own[0], own[1]))

    def part(self) -> Part | None:
        if "bank" not in self.constants:
            return None
        logits = self.logits_a.detach(), self.logits_b.detach()
        places = None if self.places_a is None or self.places_b is None else (
            self.places_a, self.places_b
        )  # fmt: skip
        return bank_part("", logits, places, self.constants["bank"], self.topk, self.dropout)

    def describe(self) -> str:
        baked = ", baked" if self.places_a is not None else ""
        return f"rank={len(self.logits_a)}, top {self.topk}{baked}"
