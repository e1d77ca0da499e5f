"""T-Few's losses against their equations in numpy, and as (IA)3's controller adds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import peftfx
from peftfx.rewriter.errors import OptionError, PassError
from peftfx.rewriter.training.choices import length_normalised, unlikelihood

from ..models import batch, first

QUESTIONS, CHOICES, TOKENS, WORDS = 3, 4, 5, 7


def by_equation(logits: Any, labels: Any, answer: Any, floor: float) -> tuple[float, float]:
    """(L_UL, L_LN), one token after the other."""
    cost, count, likely = 0.0, 0, np.zeros((QUESTIONS, CHOICES))
    for q in range(QUESTIONS):
        for c in range(CHOICES):
            logs = []
            row = q * CHOICES + c
            for t in range(labels.shape[1]):
                if labels[row, t] == -100:
                    continue
                e = np.exp(logits[row, t] - logits[row, t].max())
                p = e[labels[row, t]] / e.sum()
                logs.append(np.log(p))
                if c != answer[q]:
                    cost, count = cost - np.log(1 - p + floor), count + 1
            likely[q, c] = np.mean(logs)
    right = likely[np.arange(QUESTIONS), answer]
    return cost / count, float(np.mean(np.log(np.exp(likely).sum(1)) - right))


def example(seed: int = 0) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(QUESTIONS * CHOICES, TOKENS, WORDS)) * 2
    labels = generator.integers(0, WORDS, (QUESTIONS * CHOICES, TOKENS))
    for row in range(len(labels)):  # choices of other lengths
        labels[row, 1 + row % TOKENS :] = -100
    return logits, labels, generator.integers(0, CHOICES, QUESTIONS)


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_the_equations(floor: float) -> None:
    given = example()
    logits, labels, answer = (torch.tensor(x) for x in given)
    want = by_equation(*given, floor)
    assert float(unlikelihood(logits, labels, answer, CHOICES, floor)) == pytest.approx(
        want[0], rel=1e-12
    )
    assert float(length_normalised(logits, labels, answer, CHOICES)) == pytest.approx(
        want[1], rel=1e-12
    )
    swapped = torch.tensor((given[2] + 1) % CHOICES)  # another answer costs otherwise
    assert float(length_normalised(logits, labels, swapped, CHOICES)) != pytest.approx(
        want[1], rel=1e-3
    )


@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_the_controller_adds_them(captured: Any, zoo: Any, name: str) -> None:
    """Of a decoder, each token is predicted by the one before; of a pair's second half, by itself."""
    base = zoo["t5"] if name == "t5" else captured["decoder"][1]
    program = peftfx.run(base, "ia3{unlikelihood=0.5,length_normalised=2}")
    inputs = batch(QUESTIONS * CHOICES, 6, seed=2)
    if name == "t5":
        inputs["decoder_input_ids"] = batch(QUESTIONS * CHOICES, TOKENS, seed=3)["input_ids"]
    target = inputs.get("decoder_input_ids", inputs["input_ids"])
    labels = target.clone() % WORDS
    labels[:, :2], labels[1, -2:] = -100, -100
    answer = torch.tensor([2, 0, 3])
    given = {**inputs, "labels": labels, "answer": answer}
    controllers = peftfx.controllers(program)
    outputs = program(**inputs)
    loss = controllers.loss(outputs, given)
    logits = first(outputs).detach().double().numpy()
    seen = (logits, labels.numpy()) if name == "t5" else (logits[:, :-1], labels[:, 1:].numpy())
    want = by_equation(*seen, answer.numpy(), 0.01)
    assert float(loss.detach()) == pytest.approx(0.5 * want[0] + 2 * want[1], rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in program.trainable_parameters()
               if name == "decoder")  # fmt: skip
    with pytest.raises(PassError, match="read labels and answer of the batch"):
        controllers.loss(outputs, inputs)
    with pytest.raises(PassError, match="one answer for each"):
        controllers.loss(outputs, {**given, "answer": answer.repeat(4)[:5]})
    assert peftfx.controllers(peftfx.run(base, "ia3")).loss(outputs, {}) == 0.0


def test_bad_options() -> None:
    for option in ("unlikelihood", "length_normalised", "floor"):
        with pytest.raises(OptionError, match=option):
            peftfx.parse(f"ia3{{{option}=-1}}")
