"""LLM-Adapters' forms in their places, against their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, first, randomise
from .common import attention_with_rows, check, hooked, tensors

SETTLES = False


def test_series_equals_its_reference(captured: Any) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, "llm_adapters{form=series,bottleneck=4}"), 0.3)
    hooks: dict[str, Callable[..., Any]] = {}
    for layer in range(2):
        t = tensors(program)[f"s0.layer{layer}.ffn"]
        assert t.keys() == {"down", "up"}
        hooks[f"layers.{layer}.down"] = lambda i, o, t=t: (
            o + torch.tanh(o @ t["down"].T) @ t["up"].T
        )
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_parallel_equals_its_reference(captured: Any) -> None:
    """Beside attention and feed-forward block: each reads what the block's first product reads."""
    model, base = captured["decoder"]
    recipe = "llm_adapters{form=parallel,at=both,bottleneck=4,scale=2}"
    program = randomise(peftfx.run(base, recipe), 0.3)
    hooks: dict[str, Callable[..., Any]] = {}
    for layer, role, entry, last in (
        (n, *names)
        for n in range(2)
        for names in (("attn", "q_proj", "o_proj"), ("ffn", "up", "down"))
    ):
        t, seen = tensors(program)[f"s0.layer{layer}.{role}"], list[Tensor]()
        hooks[f"layers.{layer}.{entry}"] = lambda i, o, seen=seen: seen.append(i[0]) or o
        hooks[f"layers.{layer}.{last}"] = lambda i, o, t=t, seen=seen: (
            o + 2 * torch.tanh(seen[-1] @ t["down"].T) @ t["up"].T
        )
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_lora_equals_its_reference_and_folds(captured: Any) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, "llm_adapters{rank=2}"), 0.3).eval()
    assert peftfx.run(base, "llm_adapters").history[-1].certificate.kind == "identity"
    own = tensors(program)
    assert {n.rpartition(".")[2] for n in own} == {"q_proj", "k_proj", "v_proj", "up", "down"}
    hooks = {n: lambda i, o, t=t: o + 8 * (i[0] @ t["a"].T @ t["b"].T) for n, t in own.items()}
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    torch.testing.assert_close(first(folded(**inputs)), first(want), rtol=1e-4, atol=2e-4)


def test_prefix_equals_its_reference(captured: Any) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, "llm_adapters{form=prefix,length=4}"), 0.5)
    rows = [(t["key"], t["value"]) for t in tensors(program).values()]
    inputs = batch(4, 11, pad=3)
    with attention_with_rows(rows):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_counts_of_the_defaults(captured: Any) -> None:
    """Hu et al.: bottlenecks of 256 without biases, LoRA of rank 8, 10 rows."""
    _, base = captured["llama"]
    d, f, kv, layers = 32, 64, 16, 2
    counts = {
        "series": layers * 2 * 256 * d,
        "parallel": layers * 2 * 256 * d,
        "lora": layers * 8 * ((d + d) + 2 * (d + kv) + 2 * (d + f)),
        "prefix": layers * 2 * 10 * kv,
    }
    for form, count in counts.items():
        program = peftfx.run(base, f"llm_adapters{{form={form}}}")
        assert count == sum(p.numel() for p in program.trainable_parameters()), form


def test_bad_options(captured: Any) -> None:
    for options in ("form=prefix,at=mlp", "bottleneck=0,form=series", "rank=0"):
        with pytest.raises(OptionError, match="Choose"):
            peftfx.parse(f"llm_adapters{{{options}}}")
