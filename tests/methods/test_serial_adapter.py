"""Serial adapters against their equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import peftfx

from ..models import batch, randomise
from .common import Tensors, check, hooked, tensors


def reference(model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor]) -> Any:
    """h <- h + U gelu(D h + b_D) + b_U on the output of a sublayer's last linear (no dropout)."""

    def hook(t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def adapt(_: Any, h: Tensor) -> Tensor:
            return h + F.gelu(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

        return adapt

    with hooked(model, {n: hook(t) for n, t in tensors.items()}):
        return model(**inputs)


def test_serial_adapter_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "serial_adapter{bottleneck=6,norms=false}"))
    last = {"encoder": ("dense", "fc2"), "decoder": ("o_proj", "down")}[name]
    by_module = {
        f"layers.{site[8]}.{last[site.endswith('ffn')]}": t for site, t in tensors(program).items()
    }
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, by_module, inputs), inputs)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d, layers = 32, 2
    program = peftfx.run(base, "serial_adapter{bottleneck=6,norms=false}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * 2 * (2 * d * 6 + 6 + d)
