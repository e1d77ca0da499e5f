"""(IA)3 against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx

from ..models import batch, bert, first, llama, moved, randomise
from .common import Tensors, check, copied, hooked, tensors


def reference(model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor]) -> Any:
    """k, v <- l * k, l * v; W_down (l * h)."""

    def hook(linear: nn.Linear, vector: Tensor) -> Callable[..., Tensor]:
        if vector.numel() == linear.in_features and linear.in_features != linear.out_features:
            return lambda i, o: F.linear(i[0] * vector, linear.weight, linear.bias)
        return lambda i, o: o * vector

    hooks: dict[str, Callable[..., Tensor]] = {}
    for name, t in tensors.items():
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            hooks[name] = hook(linear, t["l"])
    with hooked(model, hooks):
        return model(**inputs)


def test_ia3_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "ia3"), 0.3)
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, tensors(program), inputs), inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_ia3_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "ia3"), 3.0)
    target: Any = ["k_proj", "v_proj", "down_proj"]
    down: Any = ["down_proj"]
    if make is bert:
        down = r".*layer\.\d+\.output\.dense"
        target = rf".*\.(key|value)|{down}"
    config = peft.IA3Config(target_modules=target, feedforward_modules=down)
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {"l": "ia3_l.default"})
    inputs = batch(4, 11, pad=2)
    torch.testing.assert_close(first(program(**inputs)), first(other(**inputs)))
    assert moved(first(base(**inputs)), first(program(**inputs))) > (
        0.001 if make is bert else 0.01
    )


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    kv, f, layers = 16, 64, 2
    program = peftfx.run(base, "ia3")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * (2 * kv + f)
