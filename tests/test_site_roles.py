"""Roles that only dataflow shows: borrowed keys, side tables, roots written as powers, late heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError
from peftfx.rewriter.program.sites import AttentionSite, EmbeddingSite, NormSite

from .models import moved, randomise

WIDTH, HEADS, VOCABULARY = 16, 2, 20


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class PowerNorm(nn.Module):
    """A root mean square norm whose root is a power."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5) * self.weight


class Layer(nn.Module):
    """Attention, and a gate by the layer's own embedding; `lends` keys and values or borrows."""

    def __init__(self, lends: bool) -> None:
        super().__init__()
        self.norm, self.q, self.o = PowerNorm(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * lends))
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.gate, self.back = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, own: Tensor, lent: Any) -> tuple[Tensor, Any]:
        h = self.norm(x)
        if len(self.kv):
            lent = tuple(heads(p(h)) for p in self.kv)
        a = F.scaled_dot_product_attention(heads(self.q(h)), *lent, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return x + self.back(F.gelu(self.gate(x)) * own), lent


class PerLayer(nn.Module):
    """Three layers, the last two with the keys and values of the first; a table for all layers;
    logits of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Embedding(VOCABULARY, 3 * 4)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(lends) for lends in (True, False, False))
        self.score = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        bounded = torch.where(ids < VOCABULARY, ids, torch.zeros_like(ids))
        own = self.own(bounded).unflatten(-1, (3, 4))
        x, lent = self.tokens(ids), None
        for index, layer in enumerate(self.layers):
            x, lent = layer(x, own[:, :, index], lent)
        return self.score(x)[torch.arange(x.shape[0]), (ids != 0).sum(1) - 1]


class Summed(nn.Module):
    """Two tables for the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.f = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.f(self.a(ids) + self.b(ids))


@pytest.fixture(scope="module")
def per_layer() -> peftfx.Program:
    torch.manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (2, 5))
    return peftfx.capture(PerLayer().eval(), (ids,))


def test_layers_that_borrow_keys_are_self_attention(per_layer: peftfx.Program) -> None:
    cores = [s for s in per_layer.sites if isinstance(s, AttentionSite)]
    assert [(s.layer, s.q, s.k, s.v) for s in cores] == [
        (i, f"layers.{i}.q.weight", "layers.0.kv.0.weight", "layers.0.kv.1.weight")
        for i in range(3)
    ]
    assert not any(s.cross for s in cores) and all(s.causal for s in cores)
    assert [s.id for s in per_layer.sites.select("q and layer>=1")] == [
        "layers.1.q.weight", "layers.2.q.weight",
    ]  # fmt: skip
    record = peftfx.run(per_layer, "prefix_tuning{length=2}").history[-1]
    assert len(record.edited) == 3 and not record.skipped


def test_cross_attention_stays_cross() -> None:
    """Keys of another stream are another's, also where this one depends on it."""
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 2, 24, 0.0, batch_first=True).eval()
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
    cores = [s for s in peftfx.capture(model, (x, y)).sites if isinstance(s, AttentionSite)]
    assert [s.cross for s in cores] == [False, False, True, False, True]


def test_norms_with_a_power_belong_to_their_layers(per_layer: peftfx.Program) -> None:
    norms = [s for s in per_layer.sites if isinstance(s, NormSite)]
    assert [(s.id, s.layer) for s in norms] == [(f"layers.{i}.norm.weight", i) for i in range(3)]


def test_a_head_may_be_read_at_chosen_tokens(per_layer: peftfx.Program) -> None:
    (head,) = per_layer.sites.select("head")
    assert head.id == "score.weight"


def test_a_prompt_goes_in_front_of_the_streams_table(per_layer: peftfx.Program) -> None:
    tables = {s.id: s.role for s in per_layer.sites if isinstance(s, EmbeddingSite)}
    assert tables == {"own.weight": "side", "tokens.weight": "token"}
    assert [s.id for s in per_layer.sites.select("embedding.side")] == ["own.weight"]
    program = randomise(peftfx.run(per_layer, "prompt_tuning{length=2}"))
    record = program.history[-1]
    assert record.edited == ("tokens.weight",)
    assert dict(record.skipped) == {
        "own.weight": "it gives its row 1 at the positions of the prompt"  # 0 is padding
    }
    model = PerLayer().eval()
    model.load_state_dict(per_layer.module.state_dict())
    (prompt,) = program.trainable_parameters()
    ids = torch.randint(2, VOCABULARY, (3, 6))
    ids[0, -2:] = 0
    padded = torch.cat([torch.ones(3, 2, dtype=torch.long), ids], 1)

    def put(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        return torch.cat([prompt.detach().expand(3, -1, -1), rows[:, 2:]], 1)

    with torch.no_grad():
        before = model(ids)
        model.tokens.register_forward_hook(put)
        want = model(padded)
        assert moved(before, want) > 0.01
        torch.testing.assert_close(program(ids), want, rtol=1e-5, atol=1e-5)


def test_two_tables_of_a_stream_are_a_choice() -> None:
    torch.manual_seed(0)
    model, ids = Summed().eval(), torch.randint(2, VOCABULARY, (2, 5))
    program = peftfx.capture(model, (ids,))
    assert {s.role for s in program.sites.of("embedding")} == {"token"}
    for where in ("", ",where=a|b"):
        with pytest.raises(PassError, match=r"a\.weight and b\.weight .* where=a"):
            peftfx.run(program, f"prompt_tuning{{length=2{where}}}")
    adapted = randomise(peftfx.run(program, "prompt_tuning{length=2,where=b}"))
    assert dict(adapted.history[-1].skipped) == {
        "a.weight": "it gives its row 0 at the positions of the prompt"
    }
