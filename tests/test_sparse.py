"""Parts of stored tensors, the choice of the largest entries, and sparse deltas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.edits.linear.sparse import (
    DenseDelta,
    Part,
    SparseDelta,
    parts_of,
)
from peftfx.rewriter.errors import NonFiniteError, PassError
from peftfx.rewriter.scores.allocate import largest
from peftfx.rewriter.scores.entries import keep_largest

from .models import batch, first, randomise


class Plain(DenseDelta):
    """Adds what it is given."""

    def __init__(self, part: Part, stored: Tensor, d: Tensor) -> None:
        super().__init__(part, stored)
        self.d = d

    def delta(self, random: bool, /, *_: Any, **reads: Any) -> Tensor:
        return self.d * (2 if random else 1)


def test_the_largest_are_exactly_so_many() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(7, 5, generator=generator) for n in "abc"}
    kept = largest(scores.items(), 20)
    inside = torch.cat([scores[n].flatten()[kept[n]] for n in "abc"])
    assert inside.numel() == 20
    assert float(inside.min()) >= float(torch.cat([*scores.values()]).flatten().sort().values[-20])
    ties = largest(
        {"a": torch.tensor([1.0, 3.0, 1.0]), "b": torch.tensor([[1.0], [2.0]])}.items(), 3
    )
    assert ties["a"].tolist() == [0, 1] and ties["b"].tolist() == [1]
    level = largest({"a": torch.zeros(4), "b": torch.zeros(3)}.items(), 5)
    assert level["a"].tolist() == [0, 1, 2, 3] and level["b"].tolist() == [0]
    everything = largest({"a": torch.tensor([0.0, -1.0])}.items(), 2)
    assert everything["a"].tolist() == [0, 1]
    with pytest.raises(NonFiniteError, match="no largest"):
        largest({"a": torch.tensor([0.0, float("nan")])}.items(), 1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_indices_into_a_part_become_indices_into_the_whole(axis: int) -> None:
    shape, rows = (4, 5, 6), (1, 3)
    part = Part((), "w", shape, axis, rows)
    want = torch.arange(120).view(shape).index_select(axis, torch.tensor(rows)).flatten()
    assert torch.equal(part.whole(torch.arange(want.numel())), want)
    assert part.own_shape == tuple(2 if a == axis else n for a, n in enumerate(shape))
    whole = Part((), "w", shape)
    assert whole.own_shape == shape and torch.equal(whole.whole(want), want)


def test_a_dense_delta_settles_to_its_largest_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, generator=generator)
    dense: dict[str, DenseDelta] = {
        "a": Plain(Part((), "w", (6, 5)), w, torch.randn(6, 5, generator=generator)),
        "b": Plain(Part((), "w", (6, 5), 1, (0, 4)), w, torch.randn(6, 2, generator=generator)),
        "c": Plain(Part((), "w", (6, 5)), w, torch.zeros(6, 5)),
    }
    decided = keep_largest(dense, 0.25)
    assert sum(d["indices"].numel() for d in decided.values()) == round(0.25 * 72)
    assert decided["a"]["indices"].dtype == torch.int32
    assert dense["c"].settled(**decided["c"]) is None
    for name in "ab":
        full = dense[name].eval()(w) - w
        sparse = dense[name].settled(**decided[name])
        assert isinstance(sparse, SparseDelta)
        changed = (sparse(w) != w).flatten().nonzero().flatten()
        assert torch.equal(changed, decided[name]["indices"].long())
        got = (sparse(w) - w).flatten()[changed]
        torch.testing.assert_close(got, full.flatten()[changed])
        assert torch.equal(dense[name].train()(w) - w, dense[name](w) - w)
        assert not torch.equal(dense[name](w), dense[name].eval()(w))


def test_gradients_of_a_sparse_delta_are_those_of_its_entries() -> None:
    w = torch.randn(4, 3)
    w[0, 0] = -0.0
    delta = SparseDelta(torch.tensor([1, 7], dtype=torch.int32), torch.randn(2))
    out = delta(w)
    assert torch.equal(torch.signbit(out[0, 0]), torch.tensor(True))  # other bits stay
    weights = torch.randn(4, 3)
    (out * weights).sum().backward()
    assert delta.values.grad is not None
    assert torch.equal(delta.values.grad, weights.flatten()[[1, 7]])
    assert list(delta.state_dict()) == ["values"]


def test_each_stored_tensor_is_one_part(captured: Any) -> None:
    _, fused = captured["fused"]
    q, v = (fused.sites.select(f"{role} and layer==0", ("linear",)) for role in "qv")
    (weight, bias), left = parts_of(fused, [*q, *v])
    assert weight.shape == (96, 32) and weight.rows == (*range(32), *range(64, 96)) and not left
    assert (bias.name, bias.own_shape) == ("layers.0.qkv.bias", (64,))
    assert [p.rows for p in parts_of(fused, fused.sites.of("linear"), False)[0]] == [None] * 9
    _, tied = captured["tied"]
    (part,), _ = parts_of(tied, [*tied.sites.select("head"), *tied.sites.of("embedding")])
    assert len(part.sites) == 2 and part.rows is None
    trained = peftfx.run(fused, "bitfit")
    (weight,), ((site, reason),) = parts_of(trained, q)
    assert site == q[0]
    assert reason == "the adapter 'bitfit' trains layers.0.qkv.bias already"


def settled(base: peftfx.Program, text: str) -> peftfx.Program:
    program = randomise(peftfx.run(base, text), 0.3)
    return randomise(peftfx.run(program, peftfx.controllers(program).finish()), 0.3)


LOWERED = {"diff_pruning{density=0.05}": "SparseDelta", "far{share=0.25}": "SliceDelta"}


@pytest.mark.parametrize("text", LOWERED)
def test_lowered_beside_their_linears(captured: Any, text: str) -> None:
    """The same numbers and gradients, less kept, and all that comes after sees the plain form."""
    _, base = captured["encoder"]
    program = settled(base, text)
    lowered = peftfx.run(program, "lower")
    matrices = [a for a in program.attachments if a.path.endswith(".weight.expression")]
    assert len(lowered.history[-1].edited) == len(matrices) > 3
    assert lowered.text().count("linear(") < program.text().count("linear(")
    gradients: list[list[Tensor]] = []
    for one in (program, lowered):
        output = first(one(**batch()))
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        trained = [p for n, p in one.named_trainable_parameters().items() if "pooler" not in n]
        gradients.append([output.detach(), *torch.autograd.grad((output * weights).sum(), trained)])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    copies = sum(base.module.get_parameter(p.path.split(".", 2)[2].removesuffix(".expression")).nbytes
                 for p in matrices)  # fmt: skip
    assert lowered.memory(4, 32).saved <= program.memory(4, 32).saved - 0.9 * copies
    off = peftfx.run(lowered, "lower{target=off}")
    assert sorted(off.text().splitlines()) == sorted(program.text().splitlines())
    for after in ("fold", "dora{rank=2}", "lora{rank=2};lower", "quantise{where=q}", "lower"):
        got, want = (first(peftfx.run(p.fork(), after)(**batch())) for p in (lowered, program))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(c.holds for c in lowered.verify())


def test_what_cannot_be_lowered_is_said(captured: Any, zoo: Any) -> None:
    gpt2 = peftfx.run(settled(zoo["gpt2"], "far{share=0.25}"), "lower")
    assert "is not what one linear multiplies by" in str(gpt2.history[-1])
    with pytest.raises(PassError, match=r"no low-rank branch to lower, nor a change"):
        peftfx.run(captured["encoder"][1], "bitfit;lower")
