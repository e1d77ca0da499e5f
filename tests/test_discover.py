"""Discovery on small hand-written models: what no library model of the zoo isolates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.program.sites import AttentionSite, LinearSite, SublayerSite

from .models import batch, build, randomise

WIDTH = 16


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int = 2) -> Tensor:
    q, k, v = (m.unflatten(-1, (heads, -1)).transpose(1, 2) for m in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Written(nn.Module):
    """Keys are written into an empty tensor, piece by piece; queries are clamped in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.rotated, self.o = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        keys = x.new_empty(x.shape)
        keys[..., : WIDTH // 2].copy_(self.k(x)[..., : WIDTH // 2])
        keys[..., WIDTH // 2 :].copy_(self.rotated(x))
        return x + self.o(attention(self.q(x).clamp_(-1, 1), keys, self.v(x)))


class Left(nn.Module):
    """A projection written as `W @ x`, with its features on the last axis but one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.step = nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.step @ self.into(x).transpose(1, 2)).cumsum(-1).transpose(1, 2)
        return x + self.out(h)


class Macaron(nn.Module):
    """Two blocks of feed-forward, attention and another feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(24, WIDTH) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x + 0.5 * self.down[2 * i](F.silu(self.up[2 * i](x)))
            x = x + self.o[i](attention(*self.qkv[i](x).chunk(3, -1)))
            x = x + 0.5 * self.down[2 * i + 1](F.silu(self.up[2 * i + 1](x)))
        return x


class Rows(nn.Module):
    """A mixer over tokens (its linears see the transposed input), then one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        sizes = [(5, 7), (WIDTH, 24)] * 2
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Linear(b, a)) for a, b in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 2):
            x = x + self.ffn[i](self.norm[i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.ffn[i + 1](self.norm[i + 1](x))
        return x


class Cross(nn.Module):
    """`nn.MultiheadAttention` on another sequence slices its weight instead of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.attention(x, memory, memory, need_weights=False)[0]


def program(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(3, 5, WIDTH)
    return model, peftfx.capture(model, (x,), **options), x


def test_in_place_writes_are_kept_and_followed() -> None:
    model, found, x = program(Written)
    assert torch.equal(found.module(x), model(x))
    roles = {(s.weight, s.role, s.features) for s in found.sites if isinstance(s, LinearSite)}
    half = tuple(range(WIDTH // 2))
    assert ("q.weight", "q", None) in roles
    assert {("k.weight", "k", half), ("rotated.weight", "k", None)} <= roles


def test_a_weight_on_the_left_takes_branches_on_its_features() -> None:
    model, found, x = program(Left)
    site = found.sites["step"]
    assert (site.role, site.left, site.in_features) == ("mixer.inner", True, 24)
    adapted = randomise(peftfx.run(found, "lora{rank=3,where=mixer.inner}"))
    (branch,) = (m for n, m in adapted.module.named_modules() if n.endswith("step.delta"))
    with torch.no_grad():
        want = model(x)
        model.step += branch.full_delta()
        moved = model(x)
    assert float((moved - want).abs().max()) > 0.01
    torch.testing.assert_close(adapted.module(x), moved, rtol=1e-5, atol=1e-5)
    folded = peftfx.run(adapted, "fold")
    assert not folded.attachments and not folded.history[-1].skipped
    torch.testing.assert_close(folded.module(x), moved, rtol=1e-5, atol=1e-5)


def test_slices_of_a_weight_are_sites_without_branches() -> None:
    inputs = torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH)
    found = peftfx.capture(Cross().eval(), inputs)
    (core,) = found.sites.of("attention")
    assert isinstance(core, AttentionSite) and core.cross and (core.heads, core.head_dim) == (2, 8)
    parts = {s.role: s for s in found.sites if isinstance(s, LinearSite)}
    for index, role in enumerate("qkv"):
        assert parts[role].features == tuple(range(WIDTH * index, WIDTH * (index + 1)))
    adapted = peftfx.run(found, "lora{rank=2,where=q|v|o}")
    assert adapted.history[-1].edited == ("attention.out_proj.weight",)
    assert [s for s, _ in adapted.history[-1].skipped] == [parts["q"].id, parts["v"].id]


def test_repeated_sublayers_have_names_of_their_own() -> None:
    _, found, _ = program(Macaron)
    ids = [s.id for s in found.sites]
    assert len(ids) == len(set(ids))
    assert [s.id for s in found.sites if isinstance(s, SublayerSite)] == [
        f"s0.layer{layer}.{name}" for layer in (0, 1) for name in ("ffn", "attn", "ffn_2")
    ]


def test_mixing_over_tokens_and_channels_is_one_layer() -> None:
    _, found, _ = program(Rows, dynamic={"x": {0: "batch"}})
    layers = [(s.layer, s.width) for s in found.sites if isinstance(s, SublayerSite)]
    assert layers == [(0, 5), (0, WIDTH), (1, 5), (1, WIDTH)]


@pytest.mark.parametrize(("name", "causal"), [("decoder", True), ("encoder", False)])
@pytest.mark.parametrize("pad", [0, 3])
def test_causality_is_read_from_the_mask(name: str, causal: bool, pad: int) -> None:
    found = peftfx.capture(build(name), kwargs=batch(pad=pad))
    cores = [s for s in found.sites if isinstance(s, AttentionSite)]
    assert cores and all(s.causal is causal for s in cores)


def test_discovery_needs_no_weights() -> None:
    with torch.device("meta"):
        model = build("decoder")
        inputs = batch()
        inputs = {n: torch.ones_like(t, device="meta") for n, t in inputs.items()}
    found = peftfx.capture(model, kwargs=inputs)
    cores = [s for s in found.sites if isinstance(s, AttentionSite)]
    assert [(s.layer, s.kv_heads, s.causal) for s in cores] == [(0, 2, True), (1, 2, True)]
