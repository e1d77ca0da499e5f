"""Rows scaled in place: gradients, what is kept, and where it would be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.row_scaling import scaled_rows


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_values_and_gradients(biased: bool, zero: bool) -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 4), (3, 4)))
    c, bias = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    c[1] *= 0 if zero else 1
    tensors = [t.requires_grad_() for t in ((w, c, bias) if biased else (w, c))]
    results: list[list[Tensor]] = []
    for in_place in (True, False):
        y = scaled_rows(x @ w.t(), c, bias if biased else None, in_place)
        assert ("InPlace" in type(y.grad_fn).__name__) is (in_place and not zero)
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), tensors)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("changed", [True, False])
def test_a_result_that_is_changed_in_place_is_not_kept(changed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=changed), nn.Linear(5, 3))
    x = torch.randn(4, 6)
    plain = peftfx.run(
        peftfx.capture(model.requires_grad_(False), (x,)), "dora{rank=2,where=linear}"
    )
    for parameter in plain.trainable_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    lowered = peftfx.run(plain, "lower")
    branches: list[Any] = [lowered.branch(a) for a in lowered.attachments]
    assert [b.in_place for b in branches] == [not changed, True]
    gradients = [
        torch.autograd.grad(p(x).pow(2).sum(), p.trainable_parameters()) for p in (plain, lowered)
    ]
    torch.testing.assert_close(*gradients)
    assert not any(b.in_place for b in map(peftfx.run(lowered, "lower{target=off}").branch,
                                            lowered.attachments))  # fmt: skip
