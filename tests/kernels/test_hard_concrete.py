"""Hard-concrete gates against their formula, Monte Carlo and hand-written gradients."""

from __future__ import annotations

import math

import pytest
import torch

from peftfx.kernels.hard_concrete import gate_noise, hard_concrete, open_probability

STRETCHES = [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3)]


@pytest.mark.parametrize(("low", "high", "t"), STRETCHES)
def test_probability_of_an_open_gate_equals_monte_carlo(low: float, high: float, t: float) -> None:
    torch.manual_seed(0)
    for alpha in (-2.0, 0.0, 0.7, 3.0):
        many = torch.full((400_000,), alpha, dtype=torch.float64)
        z = hard_concrete(many, gate_noise(many), low, high, t)
        want = 1 / (1 + math.exp(-(alpha - t * math.log(-low / high))))
        closed = float(open_probability(torch.tensor(alpha), low, high, t))
        assert closed == pytest.approx(want, abs=1e-6)
        assert float((z > 0).double().mean()) == pytest.approx(closed, abs=3e-3)
        assert float(z.min()) >= 0 and float(z.max()) <= 1


@pytest.mark.parametrize(("low", "high", "t"), STRETCHES)
def test_values_and_gradients_equal_the_formula(low: float, high: float, t: float) -> None:
    torch.manual_seed(0)
    alpha = (torch.randn(500, dtype=torch.float64) * 2).requires_grad_()
    u = gate_noise(alpha).detach()
    assert float(u.min()) >= 1e-4 and float(u.max()) <= 1 - 1e-4
    for noise, scale in ((u, t), (None, 1.0)):
        shift = 0.0 if noise is None else noise.log() - (1 - noise).log()
        s = 1 / (1 + torch.exp(-(shift + alpha.detach()) / scale))
        raw = s * (high - low) + low
        z = hard_concrete(alpha, noise, low, high, t)
        torch.testing.assert_close(z.detach(), raw.clip(0, 1))
        assert int((z == 0).sum()) > 0 and 0 < int((z == 1).sum()) < 400
        (got,) = torch.autograd.grad(z.sum(), alpha)
        inside = (raw > 0) & (raw < 1)
        torch.testing.assert_close(got, (high - low) * s * (1 - s) / scale * inside)
    p = open_probability(alpha, low, high, t)
    (got,) = torch.autograd.grad(p.sum(), alpha)
    torch.testing.assert_close(got, (p * (1 - p)).detach())


def test_noise_is_torchs_own_generator() -> None:
    alpha = torch.zeros(3, 4)
    torch.manual_seed(1)
    one, two = gate_noise(alpha), gate_noise(alpha)
    torch.manual_seed(1)
    assert torch.equal(one, gate_noise(alpha)) and not torch.equal(one, two)
    assert torch.equal(hard_concrete(alpha), hard_concrete(alpha))
