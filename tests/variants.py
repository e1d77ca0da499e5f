"""One small pre-LN transformer in the many spellings that attention, masks and inputs come in.

`explicit` is an independent reference for prefix-tuning on them: attention written out, with the
rows before keys and values. It imports nothing of peftfx.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import VOCABULARY, batch

WIDTH, HEADS, DIM, PLACES = 32, 4, 8, 40
Rows = Sequence[tuple[Tensor, Tensor]]


class SelfAttention(nn.Module):
    """Attention in the spelling `kind`, with `kv` key/value heads."""

    def __init__(self, kind: str, kv: int, bias: bool) -> None:
        super().__init__()
        self.kind, self.kv = kind, kv
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k = nn.Linear(WIDTH, kv * DIM, bias=bias)
        self.v = nn.Linear(WIDTH, kv * DIM, bias=bias)
        self.o = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.rows: tuple[Tensor, Tensor] | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, DIM).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, DIM).transpose(1, 2)
        return q, k, self.v(x).view(b, t, self.kv, DIM).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x)
        if self.rows is not None:
            a = _with_rows(self.kind, q, k, v, mask, *self.rows)
        else:
            a = _attend(self.kind, q, k, v, mask, self.training)
        return self.o(a.transpose(1, 2).reshape(b, t, WIDTH))


def _attend(
    kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, training: bool
) -> Tensor:
    if kind == "gqa":
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    if kind == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if kind == "unmasked":
        return F.scaled_dot_product_attention(q, k, v)
    if kind == "scale":
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    if kind == "fill":
        scores = q @ k.transpose(-1, -2) / math.sqrt(DIM)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v
    if kind == "sum":
        scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, 0.1, training), v)
    if kind == "einsum":
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * DIM**-0.5
        if mask is not None:
            scores = torch.where(mask, scores, -1e9)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v, mask, 0.1 if training else 0.0)


def _with_rows(
    kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pk: Tensor, pv: Tensor
) -> Tensor:
    batches, kv, tokens = k.shape[:3]
    length = pk.shape[0]
    front = [r.transpose(0, 1)[None].expand(batches, -1, -1, -1) for r in (pk, pv)]
    k, v = (
        torch.cat([r, m], 2).repeat_interleave(HEADS // kv, 1)
        for r, m in zip(front, (k, v), strict=True)
    )
    scores = q @ k.transpose(-1, -2) * (0.2 if kind == "scale" else DIM**-0.5)
    if kind == "causal":
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if mask is not None and kind != "unmasked":
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        scores = scores + torch.cat([torch.zeros(*mask.shape[:-1], length), mask], -1)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, kind: str, kv: int, bias: bool, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.attention = SelfAttention(kind, kv, bias)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.Identity() if parallel else nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        if self.parallel:
            inner = F.gelu(self.up(h), approximate="tanh")
            return x + self.drop(self.attention(h, mask)) + self.drop(self.down(inner))
        x = x + self.drop(self.attention(h, mask))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Variant(nn.Module):
    """Returns a dict with `logits` and `hidden`, and `loss` where labels are given."""

    def __init__(
        self,
        kind: str = "fused",
        kv: int = HEADS,
        mask: str = "bool",
        bias: bool = True,
        parallel: bool = False,
        shared: bool = False,
        types: bool = False,
    ) -> None:
        super().__init__()
        self.mask, self.shared = mask, shared
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.types = nn.Embedding(2, WIDTH) if types else None
        count = 1 if shared else 2
        self.blocks = nn.ModuleList(Block(kind, kv, bias, parallel) for _ in range(count))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        t = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(t)[None]
        x = self.words(input_ids) + self.places(position_ids)
        if self.types is not None:
            kinds = token_type_ids if token_type_ids is not None else torch.zeros_like(input_ids)
            x = x + self.types(kinds)
        mask = None if attention_mask is None else _mask(self.mask, attention_mask)
        for index in range(2):
            x = self.blocks[0 if self.shared else index](x, mask)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits, "hidden": x}
        flat = logits[:, :-1].reshape(-1, VOCABULARY)
        return {"loss": F.cross_entropy(flat, labels[:, 1:].reshape(-1)), "logits": logits}


def _mask(kind: str, attention_mask: Tensor) -> Tensor:
    t = attention_mask.shape[1]
    seen = attention_mask.bool()[:, None, None, :]
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    if kind == "additive":
        return (1.0 - seen.float()) * torch.finfo(torch.float32).min
    if kind == "full":
        return seen.expand(-1, 1, t, -1)
    if kind == "causal":
        return seen & ~future
    if kind == "causal sum":
        return torch.zeros(t, t).masked_fill(future, -1e9) + (1.0 - seen.float()) * -1e9
    return seen


CASES: dict[str, dict[str, Any]] = {
    "fused": {}, "additive mask": {"mask": "additive"}, "full mask": {"mask": "full"},
    "causal mask": {"mask": "causal"}, "causal sum mask": {"mask": "causal sum"},
    "grouped": {"kind": "gqa", "kv": 2}, "one key head": {"kind": "gqa", "kv": 1},
    "is_causal": {"kind": "causal"}, "no mask": {"kind": "unmasked"}, "scale": {"kind": "scale"},
    "filled scores": {"kind": "fill", "mask": "causal"},
    "summed scores": {"kind": "sum", "mask": "additive"}, "einsum": {"kind": "einsum"},
    "parallel": {"parallel": True}, "shared block": {"shared": True}, "no biases": {"bias": False},
    "token types": {"types": True},
}  # fmt: skip


def make(name: str) -> Variant:
    torch.manual_seed(0)
    return Variant(**CASES[name]).eval()


def masked(name: str) -> bool:
    """Whether the model takes an attention mask."""
    return CASES[name].get("kind") not in ("causal", "unmasked")


def inputs(name: str, rows: int = 3, tokens: int = 9, pad: int = 0) -> dict[str, Tensor]:
    made = batch(rows, tokens, pad=pad)
    if not masked(name):
        del made["attention_mask"]
    if name == "token types":
        made["token_type_ids"] = made["input_ids"] % 2
    return made


@contextlib.contextmanager
def explicit(model: Variant, rows: Rows) -> Generator[None]:
    """Runs the model's attentions by the written-out formula with rows before keys and values."""
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention)]
    for attention, pair in zip(attentions, rows, strict=True):
        attention.rows = pair
    try:
        yield
    finally:
        for attention in attentions:
            attention.rows = None
