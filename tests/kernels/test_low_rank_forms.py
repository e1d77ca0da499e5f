"""Which form of a low-rank product is chosen, that all compute the same, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.kernels import low_rank_forms
from peftfx.kernels.lora_linear import PLAIN, Form, lora_linear
from peftfx.kernels.low_rank_forms import FORMS, Sizes, candidates, chosen, flops

from ..models import batch, first, randomise

WIDE, SHORT = Sizes(4096, 64, 64, 8), Sizes(4, 64, 64, 8)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_forms_compute_the_same(form: Form) -> None:
    torch.manual_seed(0)
    shapes = ((2, 6, 5), (7, 5), (7,), (3, 5), (7, 3))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    run: Any = lora_linear
    assert torch.autograd.gradcheck(lambda *t: run(*t, 0.5, form), tensors)
    torch.testing.assert_close(run(*tensors, 0.5, form), run(*tensors, 0.5, PLAIN))
    owned = {t.untyped_storage()._cdata for t in tensors}
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        run(*tensors, 0.5, form)
    more = [t for t in seen if t.untyped_storage()._cdata not in owned]
    assert sum(t.nbytes for t in more) == low_rank_forms.kept(form, Sizes(12, 5, 7, 3), 8)


def test_merging_is_no_form_of_few_tokens_or_few_bits() -> None:
    assert any(f.merged for f in candidates(WIDE, torch.float32))
    assert not any(f.merged for f in candidates(SHORT, torch.float32))
    assert not any(f.merged for f in candidates(WIDE, torch.bfloat16))
    x = torch.randn(8, 4, dtype=torch.bfloat16)
    w, a, b = (torch.randn(s, dtype=torch.bfloat16) for s in ((6, 4), (2, 4), (6, 2)))
    merged = lora_linear(x, w, None, a, b, 1.0, Form(merged=True))
    assert torch.equal(merged, lora_linear(x, w, None, a, b, 1.0))


def test_flops_are_those_of_the_products() -> None:
    tokens, inputs, outputs, rank = SHORT
    thin, wide = 2 * tokens * inputs * rank, 2 * tokens * outputs * rank
    assert flops(PLAIN, SHORT) == 4 * thin + 3 * wide
    assert flops(PLAIN, SHORT) - flops(Form(kept=True), SHORT) == thin
    merged = flops(Form(merged=True), SHORT)
    assert merged == 2 * thin + 2 * wide + 2 * 2 * inputs * outputs * rank


def test_the_fastest_is_chosen_and_the_smaller_of_equals(monkeypatch: Any) -> None:
    times = dict.fromkeys(FORMS, 2.0) | {Form(True, False): 1.0, Form(False, False): 1.01}
    monkeypatch.setattr(low_rank_forms, "_measured", lambda *_: times)
    form, why = chosen(SHORT, torch.zeros(64, 64))
    assert form == Form(False, False) and "0.51 of the plain form's" in why
    times[Form(False, False)] = 1.5
    assert chosen(SHORT, torch.zeros(64, 64))[0] == Form(True, False)
    form, why = chosen(SHORT, torch.zeros(64, 64, device="meta"))
    assert form.kept and "not timed" in why  # by FLOPs alone


def test_the_record_says_what_was_chosen_and_replays_repeat_it(
    captured: Any, monkeypatch: Any
) -> None:
    plain = randomise(peftfx.run(captured["bert"][1], "lora{where=ffn}"))
    lowered = peftfx.run(plain, "lower{tokens=64}")
    record = lowered.history[-1]
    forms = record.plan.decisions["forms"]
    assert len(forms) == len(record.notes) == 2  # up and down
    assert "MFLOPs" in str(record) and "plain form's" in str(record)

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(low_rank_forms, "_measured", never)
    again = peftfx.run(lowered, "ia3").without("ia3")
    assert again.history[-1].plan.decisions["forms"] == forms
    inputs = batch()
    torch.testing.assert_close(first(again(**inputs)), first(plain(**inputs)))
    with pytest.raises(peftfx.RewriteError, match="tokens"):
        peftfx.run(plain, "lower{tokens=0}")
