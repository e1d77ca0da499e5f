"""The zoo's hand-written models: what needs torch alone, and what no library model isolates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, HEADS = 32, 56, 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, INNER), nn.ReLU(), nn.Dropout(0.1), nn.Linear(INNER, 5))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm beside a shortcut, projected where sizes change."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(ResidualBlock(8, 8, 1), ResidualBlock(8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return self.head(self.blocks(x).mean((2, 3)))


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SelfAttention(nn.Module):
    """Two `nn.MultiheadAttention`s with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


class Looped(nn.Module):
    """One pre-norm block, registered three times: depth without weights."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        block = LoopedBlock()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LoopedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def absorb_keys(model: Any) -> Any:
    """DeepSeek-V3 as it is served: `kv_b_proj` is never called, queries take its keys' half in and
    the output its values' half, both as views of the weight."""
    module = model.model.layers[0].self_attn
    attention = type("Absorbed", (type(module),), {"forward": _absorbed})
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    return model


def _absorbed(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    del attention_mask, options  # causal
    batch, tokens = hidden_states.shape[:2]
    rank, turned, plain = self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim
    q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
    q = q.view(batch, tokens, HEADS, -1).transpose(1, 2)
    latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split([rank, turned], -1)
    latent = self.kv_a_layernorm(latent)
    stored = self.kv_b_proj.weight.view(HEADS, -1, rank)
    q_rot = _turned(q[..., plain:], *position_embeddings)
    k_rot = _turned(k_rot[:, None], *position_embeddings)
    absorbed = torch.einsum("bhtn,hnr->bhtr", q[..., :plain], stored[:, :plain])
    scores = absorbed @ latent[:, None].transpose(-1, -2) + q_rot @ k_rot.transpose(-1, -2)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
    weights = (scores * self.scaling).masked_fill(hidden, float("-inf")).softmax(-1)
    mixed = weights @ latent[:, None]
    values = torch.einsum("bhtr,hnr->bthn", mixed, stored[:, plain:])
    return self.o_proj(values.flatten(2)), None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * cos[:, None] + half * sin[:, None]
