"""Forwards that write parameters and buffers in place, through `.data` or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import CaptureError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Writes(nn.Module):
    """A linear whose weight a forward writes, and a buffer."""

    def __init__(self, write: Callable[[Any], None], always: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.ones(4))
        self.write, self.always = write, always

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            self.write(self)
        return self.head(self.up(x) * self.seen)


def clamp_data(m: Any) -> None:
    m.up.weight.data.clamp_(-0.1, 0.1)


def clamp_no_grad(m: Any) -> None:
    with torch.no_grad():
        m.up.weight.clamp_(-0.1, 0.1)


def assign_data(m: Any) -> None:
    m.up.weight.data = m.up.weight.data.clamp(-0.1, 0.1)


def copy_data(m: Any) -> None:
    m.up.weight.data.copy_(m.up.weight.data * 0.5)


def buffer_data(m: Any) -> None:
    m.seen.data.mul_(0.5)


def buffer_add(m: Any) -> None:
    m.seen.add_(1)


WAYS = [clamp_data, clamp_no_grad, assign_data, copy_data, buffer_data, buffer_add]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("always", [False, True])
def test_writes_happen_as_the_model_does_them(way: Callable[[Any], None], always: bool) -> None:
    model = Writes(way, always).eval()
    before = copy.deepcopy(model.state_dict())
    program = peftfx.capture(model, (X,))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    eager = copy.deepcopy(model)
    program = peftfx.run(program, "lora{rank=2,where='name:head'}")
    start = {n: t.clone() for n, t in program.export_state_dict(strict=False).items()}
    other = program.fork()
    for training in (False, True, True, False):
        program.train(training), eager.train(training)
        torch.testing.assert_close(program(X), eager(X))
    got, want = program.export_state_dict(strict=False), eager.state_dict()
    for name in ("up.weight", "seen"):
        torch.testing.assert_close(got[name], want[name])
    assert any(not torch.equal(got[n], before[n]) for n in before)
    kept = other.export_state_dict(strict=False)  # what another program holds, and the model
    assert all(torch.equal(t, kept[n]) for n, t in start.items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_gradients_beside_a_written_weight() -> None:
    model = Writes(clamp_data).train()
    program, eager = peftfx.capture(model, (X,)), copy.deepcopy(model)
    program(X).square().sum().backward()
    eager(X).square().sum().backward()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(program.module.get_parameter(name).grad, parameter.grad)


def test_writes_that_no_trace_follows_are_refused() -> None:
    def part(m: Any) -> None:
        m.up.weight.data[0].clamp_(-0.1, 0.1)

    with pytest.raises(CaptureError, match=r"in training only"):
        peftfx.capture(Writes(part).eval(), (X,))

    def reshaped(m: Any) -> None:
        m.up.weight.data = m.up.weight.data.double()

    with pytest.raises(CaptureError, match=r"torch.float64 to the .data of a tensor"):
        peftfx.capture(Writes(reshaped).eval(), (X,))
