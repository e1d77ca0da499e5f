"""Prompt tuning against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx

from ..models import batch, bert, first, llama, randomise
from .common import check, hooked, tensors

LEAST_CHANGE = {"bloom": 0.005}
"""No prompt does it behind a norm of the embedding with weights near zero."""


def reference(
    model: nn.Module, embedding: str, prompt: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """X <- [P; E(x)], longer mask, positions 0.., outputs without the prompt."""
    length = prompt.shape[0]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longer = torch.cat([torch.zeros_like(ids[:, :1]).expand(-1, length), ids], 1)
    seen = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, length), mask], 1)

    def put(_: Any, e: Tensor) -> Tensor:
        return torch.cat([prompt.expand(e.shape[0], -1, -1), e[:, length:]], 1)

    with hooked(model, {embedding: put}):
        output = model(input_ids=longer, attention_mask=seen)
    return (output[0] if isinstance(output, tuple) else output)[:, length:]


def test_prompt_tuning_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "prompt_tuning{length=4}"), 0.5)
    (held,) = tensors(program).values()
    embedding = {"encoder": "words", "decoder": "embed"}[name]
    inputs = batch(4, 11, pad=3)
    want = reference(model, embedding, held["prompt"], inputs)
    check(program, base, want, inputs)
    if name == "encoder":  # the pooler reads the first real token, not the prompt
        hidden, pooled = program(**inputs)
        torch.testing.assert_close(pooled, torch.tanh(model.pooler(hidden[:, 0])))


@pytest.mark.parametrize("make", [bert, llama])
def test_prompt_tuning_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "prompt_tuning{length=5}"), 0.5)
    task: Any = "FEATURE_EXTRACTION" if make is bert else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5)
    other = peft.get_peft_model(model, config).eval()
    (held,) = tensors(program).values()
    table = next(p for n, p in other.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        table.copy_(held["prompt"])
    inputs = batch(4, 11, pad=2)
    want = first(other(**inputs))[:, 5:]
    check(program, base, want, inputs)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d = 32
    program = peftfx.run(base, "prompt_tuning{length=5}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == 5 * d
