"""Every row of every weight is in one site: fused linears, shared tensors, and weights read as views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import FoldError, PassError, RewriteError
from peftfx.rewriter.program.site_table import Sites
from peftfx.rewriter.program.sites import LinearSite

from .expect import check_rows
from .models import moved, randomise

WIDTH, HEADS, INNER = 16, 2, 24


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Parallel(nn.Module):
    """One linear makes queries, keys, values and a gated feed-forward block; one writes both."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(WIDTH, 3 * WIDTH + 2 * INNER)
        self.out = nn.Linear(WIDTH + INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, up, gate = self.fused(x).split([WIDTH, WIDTH, WIDTH, INNER, INNER], -1)
        a = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return x + self.out(torch.cat([a, F.silu(gate) * up], -1))


class Gates(nn.Module):
    """Queries and gates of the output in one linear, and rows that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH + 3)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, gate = self.q(x).chunk(2, -1)
        k, v, _ = self.kv(x).split([WIDTH, WIDTH, 3], -1)
        a = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return x + self.out(a * gate.sigmoid())


class Tied(nn.Module):
    """A head that is the token table, with no name of its own."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.transposed = transposed

    def forward(self, ids: Tensor) -> Tensor:
        h = self.inner(self.table(ids))
        return h @ self.table.weight.T if self.transposed else F.linear(h, self.table.weight)


class Auto(nn.Module):
    """A matrix and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.w)), self.w.t())


class Both(nn.Module):
    """A square matrix from the left side and from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(x @ self.w), self.w)


class Views(nn.Module):
    """Weights that are read as views, computed before they are read, or called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.view, self.plain = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        w = self.view.weight.view(HEADS, -1, WIDTH)
        y = torch.einsum("btd,hnd->bthn", x, w).flatten(2)
        return self.normed(self.plain(y)) @ self.plain.weight.tanh()


def captured(make: Any) -> tuple[nn.Module, peftfx.Program, Tensor]:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randint(0, 20, (2, 5)) if isinstance(model, Tied) else torch.randn(2, 5, WIDTH)
    program = peftfx.capture(model, (x,))
    check_rows(program)
    return model, program, x


def parts(program: peftfx.Program) -> dict[str, tuple[str, int]]:
    return {s.id: (s.role, s.out_features) for s in program.sites if isinstance(s, LinearSite)}


def adapted_rows(model: nn.Module, program: peftfx.Program, where: str, name: str) -> int:
    """How many rows of a weight LoRA changes there."""
    adapted = randomise(peftfx.run(program, f"lora{{rank=2,where={where}}}"))
    folded = peftfx.run(adapted, "fold{tied=both}").export_state_dict()[name]
    return int(((folded - model.state_dict()[name]).abs().amax(1) > 0).sum())


def test_one_linear_makes_attention_and_feed_forward() -> None:
    model, program, _ = captured(Parallel)
    assert parts(program) == {
        "fused.weight:q": ("q", 16), "fused.weight:k": ("k", 16), "fused.weight:v": ("v", 16),
        "fused.weight:ffn.up": ("ffn.up", 24), "fused.weight:ffn.gate": ("ffn.gate", 24),
        "out.weight": ("o", 16),
    }  # fmt: skip
    gate = program.sites["fused.weight:ffn.gate"]
    assert isinstance(gate, LinearSite) and gate.features == tuple(range(72, 96))
    for where in ("fused", "linear"):
        assert adapted_rows(model, program, where, "fused.weight") == 96


def test_gates_and_unread_rows_are_sites() -> None:
    model, program, _ = captured(Gates)
    assert parts(program) == {
        "q.weight:q": ("q", 16), "q.weight:attn.gate": ("attn.gate", 16),
        "kv.weight:k": ("k", 16), "kv.weight:v": ("v", 16), "kv.weight:other": ("other", 3),
        "out.weight": ("o", 16),
    }  # fmt: skip
    assert [s.id for s in program.sites.select("attn.gate", ("linear",))] == ["q.weight:attn.gate"]
    assert adapted_rows(model, program, "q.weight", "q.weight") == 32


@pytest.mark.parametrize("transposed", [False, True])
def test_a_functional_tied_head_has_an_id_of_its_own(transposed: bool) -> None:
    model, program, ids = captured(lambda: Tied(transposed))
    assert [s.id for s in program.sites] == ["table.weight", "inner.weight", "table.weight:head"]
    adapted = randomise(peftfx.run(program, "lora{rank=2,where=linear}"))
    (head,) = (m for n, m in adapted.module.named_modules() if n.endswith("head.delta"))
    (inner,) = (m for n, m in adapted.module.named_modules() if n.endswith("inner.delta"))
    with torch.no_grad():
        state = model.state_dict()
        h = F.linear(state["table.weight"][ids], state["inner.weight"] + inner.full_delta())
        want = F.linear(h + state["inner.bias"], state["table.weight"] + head.full_delta())
        torch.testing.assert_close(adapted(ids), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(FoldError, match="is also read by"):
        peftfx.run(adapted, "fold")


def test_a_matrix_and_its_transpose_are_two_sites() -> None:
    model, program, x = captured(Auto)
    assert parts(program) == {"w": ("other", 8), "w:head": ("head", WIDTH)}
    adapted = randomise(peftfx.run(program, "lora{rank=2,where=linear}"))
    first, second = (m for n, m in adapted.module.named_modules() if n.endswith(".delta"))
    w = model.get_parameter("w")
    with torch.no_grad():
        inner = F.gelu(F.linear(x, w + first.full_delta()))
        want = F.linear(inner, w.t() + second.full_delta())
        assert moved(model(x), want) > 0.01
        torch.testing.assert_close(adapted(x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(FoldError, match="is also read by linear"):
        peftfx.run(adapted, "fold")


def test_two_sites_of_one_matrix_are_untied_apart() -> None:
    _, program, x = captured(Both)
    adapted = randomise(peftfx.run(program, "lora{rank=2,where=linear}"), 0.5)
    folded = peftfx.run(adapted, "fold{tied=untie}")
    assert not folded.attachments and folded.untied == ("w_untied",)
    assert {s.weight for s in folded.sites if isinstance(s, LinearSite)} == {"w", "w_untied"}
    assert moved(adapted(x), folded(x)) < 1e-5


def test_weights_read_as_views_are_listed_with_the_reason() -> None:
    _, program, _ = captured(Views)
    fixed = {s.id: s.obstacle for s in program.sites if isinstance(s, LinearSite) and s.fixed}
    assert set(fixed) == {
        "view.weight", "normed.parametrizations.weight.original0",
        "normed.parametrizations.weight.original1", "plain.weight:other",
    }  # fmt: skip
    assert "a view of it" in fixed["view.weight"] and "einsum" in fixed["view.weight"]
    assert "tanh changes its values" in fixed["plain.weight:other"]
    assert all(i in str(program.sites) for i in fixed)
    for text in ("lora{rank=2,where=linear}", "ia3{where=linear}", "bitfit{where=linear}"):
        record = peftfx.run(program, text).history[-1]
        assert record.edited == ("plain.weight",)
        assert dict(record.skipped) == fixed
    with pytest.raises(PassError, match="a view of it"):
        peftfx.run(program, "lora{rank=2,where=view}")
    adapted = randomise(peftfx.run(program, "lora{rank=2,where=plain}"))
    with pytest.raises(FoldError, match="is also read by tanh"):
        peftfx.run(adapted, "fold")


def test_methods_on_stored_tensors_reach_views() -> None:
    _, program, x = captured(Views)
    trained = peftfx.run(program, "diff_pruning{where=view}")
    assert trained.history[-1].edited == ("view.weight",)
    before = program(x)
    assert moved(before, randomise(trained)(x)) > 0.01


def test_ids_are_unique_and_unknown_ones_name_the_nearest() -> None:
    _, program, _ = captured(Gates)
    with pytest.raises(RewriteError, match="Nearest: q") as error:
        program.sites["q.weigth:q"]
    assert isinstance(error.value, KeyError) and str(error.value).startswith("there is no site")
    with pytest.raises(RewriteError, match="several sites"):
        Sites((program.sites["q.weight:q"],) * 2)
