"""LoRA against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx

from ..models import batch, bert, first, llama, moved, randomise
from .common import Tensors, check, copied, hooked, tensors


def reference(
    model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor], scale: float
) -> Any:
    """y = W x + b + s B (A x)."""

    def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda i, o: o + scale * (i[0] @ a.T) @ b.T

    with hooked(model, {n: hook(t["a"], t["b"]) for n, t in tensors.items()}):
        return model(**inputs)


def test_lora_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "lora{rank=4,alpha=6,where=linear}"))
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, tensors(program), inputs, 1.5), inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_lora_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "lora{rank=4,alpha=8,where=q|v}"))
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {"a": "lora_A.default.weight", "b": "lora_B.default.weight"})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


def test_fused_weights_take_lora_and_ia3_by_role(captured: Any) -> None:
    model, base = captured["fused"]
    program = randomise(peftfx.run(base, "lora{rank=4,where=v}"))
    inputs = {"input_ids": batch(4, 11)["input_ids"]}
    full = {}
    for site, t in tensors(program).items():
        b = torch.cat([torch.zeros(64, 4), t["b"]])
        full[site.removesuffix(".weight:v")] = {"a": t["a"], "b": b}
    want = reference(model, full, inputs, 4.0)
    got = first(program(**inputs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    scaled = randomise(peftfx.run(base, "ia3"), 0.3)
    folded = peftfx.run(scaled, "fold")
    torch.testing.assert_close(first(folded(**inputs)), first(scaled(**inputs)))
    prefixed = peftfx.run(base, "prefix_tuning{length=3}")
    assert moved(first(base(**inputs)), first(prefixed(**inputs))) > 0


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d, kv, layers = 32, 16, 2
    program = peftfx.run(base, "lora{rank=4}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * (4 * (d + d) + 4 * (d + kv))
