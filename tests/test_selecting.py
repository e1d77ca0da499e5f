"""What a selector names and what a method takes of it: a site that a method cannot edit is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError, SelectorError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.rewriter.program.history import Plan
from peftfx.rewriter.program.selector import meaning
from peftfx.rewriter.run.run import apply_plan


class Experts(nn.Module):
    """A residual block of four experts, all of which see every token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(16), nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 32) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 32, 16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        p = self.router(h).softmax(-1)
        y = torch.bmm(F.gelu(torch.bmm(h[None].expand(4, -1, -1), self.up)), self.down)
        return x + (y * p.t()[..., None]).sum(0).view(x.shape)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.blocks = nn.Embedding(20, 16), nn.ModuleList([Experts(), Experts()])
        self.conv, self.head = nn.Conv1d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.conv(x.mT).mT)


STACKS = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")}


@pytest.fixture(scope="module")
def mixture() -> peftfx.Program:
    torch.manual_seed(0)
    return peftfx.capture(Mixture().eval(), (torch.randint(0, 20, (2, 5)),))


def share(program: peftfx.Program, names: set[str]) -> str:
    sizes = {n: p.numel() for n, p in program.base.module.named_parameters()}
    return f"{sum(sizes[n] for n in names) / sum(sizes.values()):.0%}"


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("where", ["linear", "linear and not head", "head|ffn", "not head|linear"])
def test_experts_left_out_are_in_the_record(
    mixture: peftfx.Program, method: str, where: str
) -> None:
    record = peftfx.run(mixture, f"{method}{{rank=2,where={where}}}").history[-1]
    skipped = {s: why for s, why in record.skipped if s in STACKS}
    assert skipped.keys() == STACKS
    for why in skipped.values():
        assert f"where={where!r} does not name experts sites" in why
        assert f"{share(mixture, STACKS)} of the parameters" in why
    assert f"skipped 4 ({min(STACKS)[:8]}" in str(record)
    assert not STACKS & set(record.edited) and record.edited


def test_one_layer_leaves_out_its_own_experts(mixture: peftfx.Program) -> None:
    record = peftfx.run(mixture, "lora{rank=2,where=linear and layer==1}").history[-1]
    assert record.edited == ("blocks.1.router.weight",)
    assert {s for s, _ in record.skipped} == {"blocks.1.up", "blocks.1.down"}
    assert share(mixture, {"blocks.1.up", "blocks.1.down"}) in record.skipped[0][1]


def test_a_method_that_takes_experts_says_when_a_word_does_not_name_them(
    mixture: peftfx.Program,
) -> None:
    record = peftfx.run(mixture, "diff_pruning{where=linear}").history[-1]
    reasons = {why for s, why in record.skipped if s in STACKS}
    assert len(reasons) == 1 and "where='linear' does not name experts sites" in reasons.pop()
    every = peftfx.run(mixture, "diff_pruning{where=linear|experts}").history[-1]
    assert set(every.edited) >= STACKS and not {s for s, _ in every.skipped} & STACKS
    usual = peftfx.run(mixture, "diff_pruning").history[-1]
    assert set(usual.edited) >= STACKS and not {s for s, _ in usual.skipped} & STACKS


PLACES = [
    ("experts", "experts", "blocks.0.up"), ("conv", "conv", "conv.weight"),
    ("token", "embedding", "token.weight"), ("norm", "norm", "blocks.0.norm.weight"),
    ("sublayer", "sublayer", "s0.layer0.ffn"), ("name:up", "experts", "blocks.1.up"),
]  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora", "peqa"])
@pytest.mark.parametrize(("where", "kind", "site"), PLACES)
def test_there_but_not_for_this_method(
    mixture: peftfx.Program, method: str, where: str, kind: str, site: str
) -> None:
    cls: Any = REGISTRY[method]
    if kind in cls.named:
        item = cls(where=where, **({} if method == "ia3" else {"rank": 2}))
        if (method, kind) == ("adalora", "experts"):
            with pytest.raises(OptionError, match="different ranks"):
                item.plan(mixture)
        else:
            assert site in item.plan(mixture).decisions["sites"]
        return
    with pytest.raises(SelectorError) as caught:
        peftfx.run(mixture, f"{method}{{where={where}}}")
    said = str(caught.value)
    works = " and ".join((*cls.kinds, *cls.named))
    assert f"{method} works on {works} sites only" in said and f" {kind} site" in said
    assert site in said and f"{method}{{where=" in said
    takers = [n for n, p in REGISTRY.items() if issubclass(p, Method) and kind in p.kinds + p.named]
    assert all(name in said.partition("another method")[2] for name in takers)


def test_a_part_that_a_method_cannot_take_is_skipped(mixture: peftfx.Program) -> None:
    norms = {"blocks.0.norm.weight", "blocks.1.norm.weight"}
    record = peftfx.run(mixture, "lora{rank=2,where=head|conv|token|norm}").history[-1]
    assert set(record.edited) == {"conv.weight", "head.weight"}
    assert {s for s, _ in record.skipped} == {"token.weight"} | norms
    record = peftfx.run(mixture, "peqa{where=head|conv|token|norm}").history[-1]
    assert record.edited == ("head.weight",)
    assert {s for s, _ in record.skipped} == {"conv.weight", "token.weight"} | norms


def test_blocks_of_what_is_taken_are_not_left_out(captured: Any) -> None:
    _, base = captured["encoder"]
    for text in ("lora{where=ffn}", "lora{where=layer>=1}", "lora{where=attn}", "serial_adapter",
                 "ia3", "unipelt"):  # fmt: skip
        assert peftfx.run(base, text).history[-1].skipped == (), text


@pytest.mark.parametrize("program", ["mixture", "encoder", "decoder", "fused"])
def test_every_role_and_kind_that_is_printed_selects(
    captured: Any, mixture: peftfx.Program, program: str
) -> None:
    sites = (mixture if program == "mixture" else captured[program][1]).sites
    for site in sites:
        for word in (site.role, site.kind, *site.tags):
            assert site in sites.select(word, (site.kind,)), word


def test_a_role_selects_for_a_method(mixture: peftfx.Program) -> None:
    for where in ("token", "embedding.token", "embedding"):
        record = peftfx.run(mixture, f"diff_pruning{{where={where}}}").history[-1]
        assert record.edited == ("token.weight",)


def test_the_usual_places_tell_absent_from_unsupported(mixture: peftfx.Program) -> None:
    with pytest.raises(SelectorError, match="usual places"):
        peftfx.run(mixture, "adalora{rank=2}")
    record = peftfx.run(mixture, "bitfit").history[-1]
    assert {s for s, _ in record.skipped} == STACKS
    with pytest.raises(SelectorError, match=r"attention sites, and the model has none.*another"):
        peftfx.run(mixture, "prefix_tuning")


def test_where_is_compared_by_meaning(captured: Any) -> None:
    _, base = captured["fused"]
    texts = ("k|v|ffn.down", "v|k|ffn.down", "ffn.down or v|k", " k | v|ffn.down")
    assert not any(peftfx.IA3(where=text).placed for text in texts)
    assert all(peftfx.IA3(where=t).placed for t in ("k|v", "k|v|ffn.up", "k and v|ffn.down"))
    assert meaning("a and layer >= 6|b") == meaning("b or layer>=6 & a")
    assert meaning("not a") != meaning("a") and meaning("(a|b) and c") != meaning("a|b and c")
    records = [peftfx.run(base, peftfx.IA3(where=t)).history[-1] for t in texts]
    assert all((r.edited, r.skipped) == (records[0].edited, records[0].skipped) for r in records)


def test_what_an_earlier_version_planned_is_still_skipped(mixture: peftfx.Program) -> None:
    """Its (IA)3 planned stacks of experts too, and left them alone when it applied."""
    plan = Plan({"sites": ["head.weight", "blocks.0.up"]})
    record = apply_plan(mixture, peftfx.IA3(where="head|experts"), plan).history[-1]
    assert record.edited == ("head.weight",)
    (skipped,) = record.skipped
    assert skipped[0] == "blocks.0.up" and "a version that left such sites alone" in skipped[1]


def test_an_empty_placement_is_named(mixture: peftfx.Program) -> None:
    with pytest.raises(SelectorError, match=r"lora: where is empty.*lora\{where="):
        peftfx.run(mixture, replace(peftfx.LoRA(), where=" "))
