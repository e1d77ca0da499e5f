"""BitFit against its equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import PassError

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


class Products(nn.Module):
    """A product whose operator has no place for a bias, and linears of all kinds of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8))
        self.second, self.third = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.register_buffer("fixed", torch.randn(8))
        self.fixed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(torch.relu(x @ self.first), self.second.weight, self.fixed)
        return self.third(torch.relu(y))


def test_a_bias_beside_branches_parts_none_of_them() -> None:
    """A branch whose linear then got a bias was called a second time by the next method there."""
    torch.manual_seed(0)
    x, base = torch.randn(3, 5, 8), peftfx.capture(Products().eval(), (torch.randn(2, 5, 8),))
    orders = (
        "lora{name=a};bitfit{where=linear};dora{name=b};ia3{where=linear}",
        "bitfit{where=linear};lora{name=a};dora{name=b};ia3{where=linear}",
    )
    values: list[Tensor] = []
    for order in orders:
        program = peftfx.run(
            base, order.replace("a}", "a,where=linear}").replace("b}", "b,where=linear}")
        )
        for number, (_, tensor) in enumerate(sorted(program.named_trainable_parameters().items())):
            tensor.data.add_(
                torch.linspace(-0.1, 0.2, tensor.numel()).view_as(tensor) * (number % 3)
            )
        called = [n.target for n in program.module.graph.nodes if n.op == "call_module"]
        assert len(called) == len(set(called)) == 9
        values.append(program(x))
        assert "fixed" not in program.named_trainable_parameters()
        torch.testing.assert_close(peftfx.run(program, "fold")(x), values[-1])
    torch.testing.assert_close(*values)


def test_a_bias_that_is_no_parameter() -> None:
    base = peftfx.capture(Products().eval(), (torch.randn(2, 5, 8),))
    program = peftfx.run(base, "bitfit{where=linear}")
    assert ("second.weight", "its bias fixed is no parameter") in program.history[-1].skipped
    assert set(program.named_trainable_parameters()) == {"first_bias", "third.bias"}
    trained = peftfx.run(base, "train{where=linear}").named_trainable_parameters()
    assert "fixed" not in trained and "third.bias" in trained


def test_adding_a_bias_where_there_is_one() -> None:
    """The words of the editor: a bias that is there is given back, and none is put over another."""
    base = peftfx.capture(Products().eval(), (torch.randn(2, 5, 8),))
    edit = Editor(base.fork(), "mine")
    sites: Any = edit.program.sites
    assert edit.add_bias(sites["third.weight"]) == "third.bias"
    with pytest.raises(PassError, match=r"second.weight has a bias already.* Select other"):
        edit.add_bias(sites["second.weight"])
