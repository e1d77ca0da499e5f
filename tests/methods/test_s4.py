"""S4 against its equations, its groups at any depth, and its budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.passes.hybrid.layer_groups import GROUPINGS, group_sizes
from peftfx.rewriter.errors import OptionError

from ..models import batch, first, randomise
from .common import attention_with_rows, check, hooked, tensors

SETTLES = False


@pytest.mark.parametrize(
    ("depth", "sizes"),
    [
        (12, (2, 4, 4, 2)),
        (6, (1, 2, 2, 1)),
        (4, (1, 1, 1, 1)),
        (24, (4, 8, 8, 4)),
        (2, (0, 1, 1, 0)),
    ],
)
def test_spindles(depth: int, sizes: tuple[int, ...]) -> None:
    assert group_sizes(depth, "spindle") == sizes


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_have_all_layers(grouping: str) -> None:
    for depth in range(1, 40):
        sizes = group_sizes(depth, grouping)
        assert sum(sizes) == depth and min(sizes) >= 0
        if grouping == "spindle" and depth >= 4:
            assert sizes[0] <= sizes[1] and sizes[2] >= sizes[3] >= 1
    assert list(group_sizes(20, "increasing")) == sorted(group_sizes(20, "increasing"))
    assert list(group_sizes(20, "decreasing")) == sorted(group_sizes(20, "decreasing"))[::-1]


def test_s4_equals_its_reference(captured: Any) -> None:
    """Two layers, a group each: an adapter and LoRA; a prefix, biases and LoRA."""
    model, base = captured["encoder"]
    recipe = "s4{grouping=uniform,strategies=[al,-,pbl,-],bottleneck=4,rank=2,length=3}"
    program = randomise(peftfx.run(base, recipe), 0.3)
    slots: dict[str, dict[str, Tensor]] = {}
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        slots[f"{attachment.site} {attachment.slot}"] = dict(branch.named_parameters())
    members = {a.path.split(".")[2] for a in program.attachments}
    assert members == {"adapter1", "lora1", "prefix3", "lora3"}
    hooks: dict[str, Callable[..., Any]] = {}
    for layer, name in ((n, m) for n in range(2) for m in ("query", "value")):
        t = slots[f"layers.{layer}.{name}.weight delta"]
        hooks[f"layers.{layer}.{name}"] = lambda i, o, t=t: o + 8 * (i[0] @ t["a"].T @ t["b"].T)
    t = slots["s0.layer0.ffn serial"]
    norm, stream = model.layers[0], []
    hooks["layers.0.fc1"] = lambda i, o: stream.append(i[0]) or o

    def adapter(_: Any, o: Tensor) -> Tensor:
        z = norm.norm2(stream[-1] + o)
        return o + (z @ t["down"].T + t["down_bias"]).clamp(min=0) @ t["up"].T + t["up_bias"]

    hooks["layers.0.fc2"] = adapter
    rows = slots["s0.layer1.attn.core key_value"]
    nothing = torch.zeros(0, *rows["key"].shape[1:])
    biases = {n: p for n, p in program.named_trainable_parameters().items() if n.endswith(".bias")}
    assert biases and all(n.startswith("layers.1.") for n in biases)
    before = {n: p.clone() for n, p in model.named_parameters() if n in biases}
    inputs = batch(4, 11, pad=3)
    try:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in biases:
                    p.copy_(biases[n])
        with (
            hooked(model, hooks),
            attention_with_rows([(nothing, nothing), (rows["key"], rows["value"])]),
        ):
            want = first(model(**inputs)).clone()
    finally:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in before:
                    p.copy_(before[n])
    check(program, base, want, inputs)


def test_counts(captured: Any) -> None:
    _, base = captured["encoder"]
    d, r, low, length = 32, 4, 2, 3
    recipe = "s4{grouping=uniform,strategies=[al,-,ap,-],bottleneck=4,rank=2,length=3}"
    program = peftfx.run(base, recipe)
    adapters = 2 * (2 * d * r + r + d)
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == adapters + 2 * 2 * low * d + 2 * length * d


@pytest.mark.parametrize("share", [0.06, 0.1, 0.3])
def test_a_budget_is_kept_and_used(captured: Any, share: float) -> None:
    _, base = captured["encoder"]
    whole = sum(p.numel() for p in base.module.parameters())
    program = peftfx.run(base, f"s4{{budget={share},strategies=[al,al,apl,pl]}}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert 0.6 * share * whole < count <= share * whole


def test_allocations_are_by_group(captured: Any) -> None:
    _, base = captured["encoder"]
    recipe = "s4{grouping=uniform,strategies=[l,l,l,l],rank=10,allocation=increasing}"
    program = peftfx.run(base, recipe)
    ranks = {n: len(t["a"]) for n, t in tensors(program).items()}
    assert ranks == {
        "layers.0.query": 4,
        "layers.0.value": 4,
        "layers.1.query": 12,
        "layers.1.value": 12,
    }


def test_both_streams_of_an_encoder_decoder(zoo: Any) -> None:
    program = peftfx.run(
        zoo["t5"], "s4{grouping=uniform,strategies=[a,-,p,-],bottleneck=2,length=2}"
    )
    sites = sorted(a.site for a in program.attachments)
    assert sites == ["s0.layer0.ffn", "s0.layer1.attn.core", "s1.layer0.ffn", "s1.layer1.attn.core"]


@pytest.mark.parametrize(
    "options",
    [
        "strategies=[a,b]",
        "strategies=[a,b,c,d]",
        "strategies=[-,-,-,-]",
        "rank=0",
        "budget=0",
        "budget=2",
    ],
)
def test_bad_options(options: str) -> None:
    with pytest.raises(OptionError, match=r"s4.*Choose"):
        peftfx.parse(f"s4{{{options}}}")


def test_a_budget_below_the_smallest_unit(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(OptionError, match=r"smallest adapter.*Choose a larger budget"):
        peftfx.run(base, "s4{budget=0.0001}")
