"""Greedy generation equals the eager model's own, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.errors import InputError

from .models import batch, randomise


@pytest.mark.parametrize("pad", [0, 3])
def test_equals_transformers(captured: Any, pad: int) -> None:
    model, program = captured["llama"]
    inputs = batch(3, 6)
    inputs["attention_mask"][0, :pad] = 0
    want = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
    if not pad:
        got = program.generate(*inputs.values(), max_new_tokens=12)
        assert torch.equal(got, want)
    positions = peftfx.capture(
        model, kwargs={**inputs, "position_ids": torch.arange(6).expand(3, -1)}
    )
    assert torch.equal(positions.generate(*inputs.values(), max_new_tokens=12), want)


def test_end_tokens_stop_rows(captured: Any) -> None:
    _, program = captured["llama"]
    plain = program.generate(batch(3, 6)["input_ids"], max_new_tokens=8)
    end = int(plain[0, 8])
    stopped = program.generate(batch(3, 6)["input_ids"], None, 8, end, 63)
    assert (stopped[0, 9:] == 63).all()


def test_prompted_and_prefixed_programs_generate(captured: Any) -> None:
    _, base = captured["decoder"]
    for text in ("prompt_tuning{length=3}", "prefix_tuning{length=3}"):
        program = randomise(peftfx.run(base, text), 0.5)
        assert program.generate(*batch(2, 5).values(), max_new_tokens=4).shape == (2, 9)
    assert not program.training


def test_models_without_logits_say_so(captured: Any) -> None:
    with pytest.raises(InputError, match="logits"):
        captured["bert"][1].generate(batch()["input_ids"])
    with pytest.raises(InputError, match=r"\[batch, sequence\]"):
        captured["llama"][1].generate(torch.zeros(3, dtype=torch.long))
