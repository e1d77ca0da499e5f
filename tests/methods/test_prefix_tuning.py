"""Prefix-tuning against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx

from ..models import batch, bert, llama, randomise
from .common import attention_with_rows, check, tensors


def reference(
    model: nn.Module, rows: list[tuple[Tensor, Tensor]], inputs: Mapping[str, Tensor]
) -> Any:
    """K <- [P_k; K], V <- [P_v; V], every layer; rows [length, kv_heads, dim] in layer order."""
    with attention_with_rows(rows):
        return model(**inputs)


def test_prefix_tuning_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "prefix_tuning{length=5}"), 0.5)
    rows = [(t["key"], t["value"]) for t in tensors(program).values()]
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, rows, inputs), inputs)


def test_projected_prefix_is_the_mlp_of_its_embedding(captured: Any) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, "prefix_tuning{length=5,projection=7}"), 0.3)
    rows: list[tuple[Tensor, Tensor]] = []
    for t in tensors(program).values():
        inner = torch.tanh(t["embedding"] @ t["inner.weight"].T + t["inner.bias"])
        both = (inner @ t["outer.weight"].T + t["outer.bias"]).view(5, 2, 2, 8)
        rows.append((both[:, 0], both[:, 1]))
    inputs = batch(4, 11)
    check(program, base, reference(model, rows, inputs), inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_prefix_tuning_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "prefix_tuning{length=5,shift_positions=true}"), 0.5)
    task: Any = "FEATURE_EXTRACTION" if make is bert else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5)
    other = peft.get_peft_model(model, config).eval()
    flat: list[Tensor] = []
    for t in tensors(program).values():
        flat += [t["key"].reshape(5, -1), t["value"].reshape(5, -1)]
    table = next(p for n, p in other.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        table.copy_(torch.cat(flat, 1))
    inputs = batch(4, 11)
    check(program, base, other(**inputs), inputs)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    kv, layers = 16, 2
    program = peftfx.run(base, "prefix_tuning{length=5}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * 2 * 5 * kv
