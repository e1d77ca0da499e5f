"""MerA: units in another order are found again, by weights and by what they give."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError, PassError

from ..models import batch, first, moved, randomise
from .test_adapter_soup import ONE, named, values

KINDS = {
    "serial": ONE,
    "pfeiffer": f"{ONE[:-1]},placement=pfeiffer}}",
    "parallel": "parallel_adapter{bottleneck=4}",
    "heads": "parallel_adapter{bottleneck=4,where=attn and sublayer}",
}
Arrays = dict[str, np.ndarray[Any, Any]]


def two(base: peftfx.Program, text: str = ONE, noise: float = 0.0) -> peftfx.Program:
    """An adapter, and one with the same units in another order, moved by noise."""
    program = randomise(peftfx.run(base, f"{named(text, 'a', 0)};{named(text, 'b', 1)}"), 0.3)
    order, drawn = torch.tensor([2, 0, 3, 1]), torch.Generator().manual_seed(5)
    held = program.named_trainable_parameters()
    with torch.no_grad():
        for name, parameter in held.items():
            if not name.startswith("peftfx.b."):
                continue
            own, leaf = held[name.replace("peftfx.b.", "peftfx.a.")], name.rpartition(".")[2]
            moved_ = {"up": own[..., order], "up_bias": own}.get(leaf, own[order])
            parameter.copy_(moved_ + noise * torch.randn(own.shape, generator=drawn))
    return program


def outputs(program: peftfx.Program, **options: Any) -> Tensor:
    return first(program(**batch(4, 11, pad=3), **options)).detach()


@pytest.mark.parametrize("cost", ["weights", "activations"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_order_of_units_is_undone(captured: Any, kind: str, cost: str) -> None:
    _, base = captured["decoder"]
    program = two(base, KINDS[kind])
    data = [batch(3, 7, seed=k, pad=2) for k in range(2)]
    merged = peftfx.run(program, f"mera{{cost={cost}}}", data=data)
    want = outputs(program.only(("a",)))
    torch.testing.assert_close(outputs(merged), want, rtol=1e-6, atol=1e-6)
    assert merged.history[-1].plan.decisions["moved"]["b"] == 1.0  # no unit stays at its place
    assert moved(want, outputs(peftfx.run(program, "adapter_soup"))) > 0.05  # no mean of anything
    assert {a.adapter for a in merged.attachments} == {"mera"}


def equation(a: Arrays, b: Arrays, place: str) -> tuple[Arrays, np.ndarray[Any, Any]]:
    """The mean of a and of b's units at the places of a that cost least, by all orders."""
    ours, theirs = (
        np.concatenate([t[f"{place}.down"], t[f"{place}.up"].T], 1).astype(np.float64)
        for t in (a, b)
    )
    cost = ((theirs[:, None] - ours[None]) ** 2).sum(-1)
    orders = list(itertools.permutations(range(4)))
    best = min(orders, key=lambda o: sum(cost[i, j] for j, i in enumerate(o)))
    own = {leaf: b[f"{place}.{leaf}"] for leaf in ("down", "down_bias", "up", "up_bias")}
    own |= {n: own[n][list(best)] for n in ("down", "down_bias")} | {"up": own["up"][:, list(best)]}
    return {n: (a[f"{place}.{n}"].astype(np.float64) + t) / 2 for n, t in own.items()}, cost


def test_the_merge_is_the_mean_of_the_best_order(captured: Any) -> None:
    _, base = captured["decoder"]
    program = two(base, noise=0.2)
    a, b = (values(program, n) for n in "ab")
    merged = values(peftfx.run(program, "mera"), "mera")
    places = {n.rpartition(".")[0] for n in merged}
    assert len(places) == 2
    for place in places:
        want, cost = equation(a, b, place)
        for leaf, tensor in want.items():
            np.testing.assert_allclose(merged[f"{place}.{leaf}"], tensor, rtol=1e-5, atol=1e-6)
        rows, columns = linear_sum_assignment(cost)
        plan = ot.emd(np.full(4, 0.25), np.full(4, 0.25), cost)
        assert np.allclose(plan[rows, columns], 0.25)


def test_a_smoothed_plan_has_the_marginals(captured: Any) -> None:
    """Of much entropy, every unit is the mean of all; of little, it is the exact plan."""
    _, base = captured["block"]
    program = two(base, noise=0.1)
    exact = values(peftfx.run(program, "mera"), "mera")
    little = values(peftfx.run(program, "mera{solver=sinkhorn,regularisation=0.002}"), "mera")
    much = values(peftfx.run(program, "mera{solver=sinkhorn,regularisation=0.999}"), "mera")
    for name, tensor in exact.items():
        np.testing.assert_allclose(little[name], tensor, atol=1e-3)
    down = next(n for n in exact if n.endswith(".down"))
    assert np.abs(much[down] - exact[down]).max() > 0.1
    a, b = (values(program, n) for n in "ab")
    np.testing.assert_allclose(much[down].mean(0), (a[down] + b[down]).mean(0) / 2, atol=1e-5)


def test_a_plan_of_zeros_is_refused(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = captured["block"]
    program = two(base)
    for wrong in (0.0, float("nan"), 1.0):
        monkeypatch.setattr(ot, "sinkhorn", lambda *_, wrong=wrong, **__: np.full((4, 4), wrong))
        with pytest.raises(PassError, match=r"marginals are off by .* Choose solver=emd"):
            peftfx.run(program, "mera{solver=sinkhorn}")


def test_three_members_and_identical_ones(captured: Any) -> None:
    """All are carried to the first; adapters without a difference are themselves."""
    _, base = captured["block"]
    text = ";".join(named(ONE, n, k) for k, n in enumerate("abc"))
    program = randomise(peftfx.run(base, text))
    merged = peftfx.run(program, "mera")
    for name in merged.history[-1].plan.decisions["moved"]:
        pair = peftfx.run(program, f"mera{{names=[a,{name}]}}")
        alone = values(pair, "mera")
        for key, got in values(peftfx.run(program, "mera{names=[a,b,c]}"), "mera").items():
            assert got.shape == alone[key].shape
    a, b, c = (values(program, n) for n in "abc")
    pairs = [values(peftfx.run(program, f"mera{{names=[a,{n}]}}"), "mera") for n in "bc"]
    for key, got in values(merged, "mera").items():  # (a + b' + c') / 3 from (a + b') / 2
        want = (2 * pairs[0][key] + 2 * pairs[1][key] - a[key]) / 3
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert b.keys() == c.keys()


def test_bad_input(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = captured["block"]
    program = two(base)
    with pytest.raises(PassError, match="cost=activations needs batches"):
        peftfx.run(program, "mera{cost=activations}")
    with pytest.raises(PassError, match="no tokens in the batches"):
        peftfx.run(program, "mera{cost=activations}", data=[])
    loras = peftfx.run(base, "lora{rank=2,name=a};lora{rank=2,name=b}")
    with pytest.raises(PassError, match="inner units of bottleneck adapters"):
        peftfx.run(loras, "mera")
    for options in ("regularisation=0", "regularisation=1", "cost=outputs", "solver=simplex"):
        with pytest.raises(OptionError, match="mera"):
            peftfx.parse(f"mera{{{options}}}")
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(OptionError, match="pip install POT"):
        peftfx.run(program, "mera")
