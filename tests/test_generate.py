"""Greedy generation equals the eager model's own, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError
from peftfx.rewriter.program.last_token import at_last_token

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


@pytest.mark.parametrize("text", ["", "lora{rank=2,where=linear};ia3{where=linear}"])
def test_the_head_is_computed_at_the_last_token(captured: Any, text: str) -> None:
    program = captured["llama"][1]
    program = randomise(peftfx.run(program, text), 0.5) if text else program
    module = program.eval().module
    last = at_last_token(module, 0)
    inputs = batch(3, 6)
    with torch.no_grad():
        want, got = program(**inputs).logits, last(**program.spec.bind((), inputs)).logits
    assert want.shape[1] == 6 and got.shape[1] == 1
    torch.testing.assert_close(got[:, 0], want[:, -1])
    assert {id(p) for p in last.parameters()} <= {id(p) for p in module.parameters()}


class Normed(nn.Module):
    """Its logits depend on all tokens."""

    def __init__(self, over: int) -> None:
        super().__init__()
        self.embed, self.head, self.over = nn.Embedding(16, 8), nn.Linear(8, 16), over

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids)).softmax(self.over)


def test_a_head_that_mixes_tokens_is_computed_at_all(captured: Any) -> None:
    ids = torch.arange(10).view(2, 5)
    for over in (1, 2):
        program = peftfx.capture(Normed(over).eval().requires_grad_(False), (ids,))
        assert at_last_token(program.module, 0) is program.module
        assert program.generate(ids, max_new_tokens=3).shape == (2, 8)
    routed = peftfx.run(captured["llama"][1], "prompt_tuning{length=3}").eval()
    assert routed.generate(*batch(2, 5).values(), max_new_tokens=3).shape == (2, 8)
