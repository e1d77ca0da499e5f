"""The causal fast path: valid where it is offered, equal, and closed to padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.errors import InputError, PassError
from peftfx.rewriter.graph.modes import Attention

from .models import batch, first
from .zoo import ZOO


def masks(program: Any) -> list[Any]:
    gm = program.module
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    return [n for n in calls if isinstance(gm.get_submodule(n.target), Attention)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3", "mixtral"])
def test_decoders_run_without_a_mask(zoo: Any, name: str) -> None:
    model, program = zoo.model(name), zoo[name]
    fast = peftfx.run(program, "causal{length=64}")
    assert all(n.args[3:5] == (None, True) for n in masks(fast)) and masks(fast)
    for size in ((3, 9), (1, 1), (2, 33)):
        inputs = ZOO[name].inputs(*size)
        mask = inputs.pop("attention_mask")
        got = fast(**inputs).logits
        torch.testing.assert_close(got, program(**inputs, attention_mask=mask).logits)
        torch.testing.assert_close(got, model(**inputs).logits)
    assert fast.history[-1].certificate.kind == "bounded"
    assert len(fast.module.graph.nodes) < len(program.module.graph.nodes) - 5


def test_grouped_queries_are_not_repeated(captured: Any) -> None:
    fast = peftfx.run(captured["llama"][1], "causal")
    assert all(n.kwargs["enable_gqa"] for n in masks(fast))
    assert not any(getattr(s, "repeated", True) for s in fast.sites.of("attention"))
    adapted = peftfx.run(fast, "prefix_tuning{length=3};lora{rank=2}")
    inputs = {"input_ids": batch()["input_ids"]}
    first(adapted(**inputs)).pow(2).mean().backward()
    assert all(p.grad is not None for p in adapted.trainable_parameters())


def test_adapters_stay_and_can_be_removed(captured: Any) -> None:
    _, program = captured["decoder"]
    inputs = {"input_ids": batch()["input_ids"]}
    adapted = peftfx.run(program, "lora{rank=2};causal")
    torch.testing.assert_close(adapted(**inputs), program(**batch()))
    assert adapted.without("lora").spec.names == ("input_ids",)
    assert adapted.verify()


def test_padding_is_refused(captured: Any) -> None:
    fast = peftfx.run(captured["llama"][1], "causal{length=32}")
    with pytest.raises(InputError, match="leaves padding out"):
        fast(**batch(pad=2))
    with pytest.raises(InputError, match=r"range 1\.\.32 \(its masks were proven causal"):
        fast(input_ids=torch.ones(2, 33, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("mistral", 64, "not causal at 33 tokens"),  # a sliding window of 32
        ("bert", 64, "not causal"),
        ("vit", 64, "not causal at 17 tokens"),  # of a fixed number
    ],
)
def test_where_it_is_not_valid(zoo: Any, name: str, length: int, message: str) -> None:
    with pytest.raises(PassError, match=message):
        peftfx.run(zoo[name], f"causal{{length={length}}}")


def test_a_sliding_window_is_causal_within_itself(zoo: Any) -> None:
    program = zoo["mistral"]
    fast = peftfx.run(program, "causal{length=32}")
    inputs = ZOO["mistral"].inputs(2, 32)
    want = program(**inputs).logits
    torch.testing.assert_close(fast(input_ids=inputs["input_ids"]).logits, want)
