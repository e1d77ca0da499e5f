"""BitFit against its equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

import peftfx

from ..models import batch, randomise
from .common import check, hooked


def reference(model: nn.Module, biases: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """The model with other biases; a linear without one gets `+ b`."""
    hooks: dict[str, Callable[..., Tensor]] = {}
    saved: dict[str, Tensor] = {}
    held = dict(model.named_parameters())
    for name, bias in biases.items():
        if name in held:
            saved[name] = held[name].detach().clone()
            held[name].data.copy_(bias)
        else:
            hooks[name.removesuffix(".bias")] = lambda i, o, b=bias: o + b
    try:
        with hooked(model, hooks):
            return model(**inputs)
    finally:
        for name, bias in saved.items():
            held[name].data.copy_(bias)


def test_bitfit_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "bitfit"))
    biases = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, biases, inputs), inputs)
    if name == "encoder":
        program.export_state_dict()
    else:
        with pytest.raises(peftfx.RewriteError, match=r"layers.0.q_proj.bias"):
            program.export_state_dict()
        assert "layers.0.q_proj.bias" in program.export_state_dict(strict=False)
