"""Small hand-written models, and tiny random transformers models, for all tests."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 64


class EncoderLayer(nn.Module):
    """Post-LN encoder block with dropout, like BERT's."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            m(x).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for m in (self.query, self.key, self.value)
        )
        p = 0.1 if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, mask, p)
        x = self.norm1(x + self.drop(self.dense(a.transpose(1, 2).reshape(b, t, d))))
        return self.norm2(x + self.drop(self.fc2(F.gelu(self.fc1(x)))))


class Encoder(nn.Module):
    """Token, position and type embeddings, two post-LN blocks, and a first-token pooler."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(40, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, 2 * width) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.register_buffer("position_ids", torch.arange(40)[None], persistent=False)
        self.position_ids: Tensor

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        t = input_ids.shape[1]
        x = self.norm(self.words(input_ids) + self.places(self.position_ids[:, :t]))
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class DecoderLayer(nn.Module):
    """Pre-norm block with rotary positions, grouped queries and SwiGLU, like Llama's."""

    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def project(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = h.shape
        q = rotate(self.q_proj(h).view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(h).view(b, t, self.kv_heads, self.dim).transpose(1, 2), cos, sin)
        return q, k, self.v_proj(h).view(b, t, self.kv_heads, self.dim).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.project(self.norm1(x), cos, sin)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        a = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.o_proj(a.transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class Decoder(nn.Module):
    """Causal language model; `tied` shares the head with the embedding."""

    def __init__(self, width: int = 32, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(DecoderLayer(width, 4, 2, 2 * width) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("freq", 1.0 / 100 ** (torch.arange(0, 8, 2) / 8), persistent=False)
        self.freq: Tensor
        if tied:
            self.head.weight = self.embed.weight

    def angles(self, t: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(t, device=self.freq.device).float()
        angles = positions[:, None] * self.freq[None, :]
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        t = input_ids.shape[1]
        cos, sin = self.angles(t)
        causal = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal[None, None] & attention_mask.bool()[:, None, None, :]
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.head(self.norm(x))


class TinyLayer(nn.Module):
    """Pre-norm block of few operators."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (
            m(h).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for m in (self.query, self.key, self.value)
        )
        a = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tiny(nn.Module):
    """Causal model of one block, with as few operators as every recipe needs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([TinyLayer(width, 2)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        t = input_ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal & attention_mask.bool()[:, None, None, :]
        return self.head(self.layers[0](self.embed(input_ids), mask))


class FusedLayer(nn.Module):
    """Pre-LN block with one fused q, k, v projection and plain matmul attention, like GPT's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(d, dim=-1)
        q, k, v = (m.view(b, t, self.heads, d // self.heads).transpose(1, 2) for m in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)
        hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class Fused(nn.Module):
    """Causal model with fused projections, learnt positions and no mask input."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(40, width)
        self.layers = nn.ModuleList(FusedLayer(width, 4) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Convolutional(nn.Module):
    """A small network with batch norm, whose statistics training updates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def batch(rows: int = 3, tokens: int = 9, seed: int = 0, pad: int = 0) -> dict[str, Tensor]:
    """Random ids with a mask; the last `pad` tokens of row 0 are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, -pad:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def build(name: str) -> Any:
    """A model by name, with fixed random weights, in evaluation mode."""
    torch.manual_seed(0)
    made: nn.Module
    if name == "encoder":
        made = Encoder()
    elif name == "decoder":
        made = Decoder()
    elif name == "tiny":
        made = Tiny()
    elif name == "block":
        made = Decoder(layers=1)
    elif name == "tied":
        made = Decoder(tied=True)
    elif name == "fused":
        made = Fused()
    elif name == "bert":
        made = bert()
    elif name == "llama":
        made = llama()
    else:
        raise ValueError(name)
    return made.eval()


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    ))  # fmt: skip


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, pad_token_id=0, **options,
    ))  # fmt: skip


def first(output: Any) -> Tensor:
    """The per-token output of any of the models."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    beside = type(output).__name__ == "Outputs"  # a value beside those that a method adds
    return output[0] if isinstance(output, tuple) or beside else output


def scramble(model: nn.Module) -> nn.Module:
    """Renames every submodule and parameter attribute, recursively, and the classes."""
    count = 0

    def rename(owner: nn.Module) -> None:
        nonlocal count
        names: dict[str, str] = {}
        kinds: Any = (owner._modules, owner._parameters)
        for kind in kinds:
            for key in list(kind):
                count += 1
                names[key] = f"z{(count * 7919) % 10007}"
        if type(owner) in (nn.ModuleList, nn.Linear, nn.Embedding, nn.LayerNorm):
            names = {k: k for k in names}
        else:
            fresh = type(f"Q{count}", (type(owner),), {})
            for old, new in names.items():
                setattr(fresh, old, property(lambda self, n=new: getattr(self, n)))
            for kind in kinds:
                for key in list(kind):
                    kind[names[key]] = kind.pop(key)
            owner.__class__ = fresh
        for child in owner._modules.values():
            if child is not None:
                rename(child)

    rename(model)
    return model


def randomise(program: Any, scale: float = 0.1, seed: int = 0) -> Any:
    """Moves every trainable parameter, so that nothing is at its vacuous initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.device))
    return program


def moved(before: Tensor, after: Tensor) -> float:
    """Largest change relative to the largest output."""
    return float((after - before).detach().abs().max() / before.detach().abs().max())
