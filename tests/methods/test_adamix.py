"""AdaMix against its equations: draws, consistency, and the merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.rewriter.errors import OptionError, PassError, SelectorError

from ..formats.adapterhub_models import output
from ..formats.write_with_peftfx import program as of_hub
from ..models import batch, first, moved, randomise
from .common import LAST, check, hooked, subject, tensors

DRAWS = True
SMALL = "adamix{adapters=3,bottleneck=4,shared_up=false}"


def adapter(t: Mapping[str, Tensor], down: int | None, up: int | None) -> Callable[..., Tensor]:
    """h <- h + U_j gelu(D_i h + b_i) + c_j, or with the means."""
    d, b = (t[n].mean(0) if down is None else t[n][down] for n in ("down", "down_bias"))
    u, c = (t[n].mean(0) if up is None else t[n][up] for n in ("up", "up_bias"))
    return lambda _, h: h + F.gelu(h @ d.T + b) @ u.T + c


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_evaluation_runs_the_mean(captured: Any, name: str) -> None:
    model, base = captured[name]
    program = randomise(peftfx.run(base, SMALL), 0.3)
    hooks = {
        LAST[name]["s0"]["ffn"].format(k): adapter(tensors(program)[f"s0.layer{k}.ffn"], None, None)
        for k in range(2)
    }
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_training_runs_one_of_each(captured: Any) -> None:
    """Down and up are drawn apart, anew in each forward, evenly, and for the whole batch."""
    _, base = captured["decoder"]  # without dropout
    program = randomise(peftfx.run(base, SMALL), 0.3)
    branch: Any = program.branch(program.attachments[0])
    t = {n: p.detach() for n, p in branch.named_parameters()}
    h = torch.randn(2, 5, 32)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    wanted = [adapter(t, i, j)(None, h) for i, j in pairs]
    torch.manual_seed(0)
    counts = dict.fromkeys(pairs, 0)
    with torch.no_grad():
        for _ in range(450):
            got = branch.train()(h)
            (found,) = (
                p for p, w in zip(pairs, wanted, strict=True) if torch.allclose(got, w, atol=1e-5)
            )
            counts[found] += 1
    assert all(25 < n < 80 for n in counts.values()), counts  # 50 each, deviation 6.7
    branch.eval()
    assert torch.equal(branch(h), branch(h))


def test_shared_projections_and_the_count(captured: Any) -> None:
    """Training L [M (d r + r) + (d r + d)], afterwards L (2 d r + r + d)."""
    _, base = captured["bert"]
    d, r, layers, m = 32, 4, 2, 3
    program = peftfx.run(base, "adamix{adapters=3,bottleneck=4}")
    count = layers * (m * (d * r + r) + (d * r + d))
    assert sum(p.numel() for p in program.trainable_parameters()) == count
    merged = peftfx.run(program, "bake")
    count = layers * (2 * d * r + r + d)
    assert sum(p.numel() for p in merged.trainable_parameters()) == count
    own = tensors(program)["s0.layer0.ffn"]
    assert not torch.equal(own["down"][0], own["down"][1])  # each starts by itself
    assert abs(float(own["down"].std()) - 0.02) < 2e-3


def test_where_ups_alone_are_mixed_the_merge_is_the_ensemble(captured: Any) -> None:
    """Exact for what is linear in the mixture; for mixed downs it is not."""
    base = captured.double("encoder")
    program = randomise(peftfx.run(base, SMALL), 0.3)
    t = tensors(program)["s0.layer0.ffn"]
    h = torch.randn(2, 5, 32).double()
    merged: Any = program.branch(program.attachments[0]).settled()
    t["down"][1:], t["down_bias"][1:] = t["down"][0], t["down_bias"][0]
    alone: Any = program.branch(program.attachments[0]).settled()
    every = torch.stack([adapter(t, i, j)(None, h) for i in range(3) for j in range(3)]).mean(0)
    assert float((alone(h) - every).detach().abs().max()) < 1e-12
    assert float((merged(h) - every).detach().abs().max()) > 1e-3


def test_one_adapter_is_left(captured: Any, tmp_path: Path) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, SMALL), 0.3)
    merged = peftfx.run(program, peftfx.controllers(program).finish())
    gap = (first(merged(**batch())) - first(program(**batch()))).detach().abs().max()
    assert float(gap) <= 1e-12
    assert not peftfx.controllers(merged).finish().passes
    peftfx.save(merged, tmp_path / "a")
    again = peftfx.load(base, tmp_path / "a")
    assert torch.equal(first(again(**batch())), first(merged(**batch())))
    assert torch.equal(first(merged.train()(**batch())), first(again(**batch())))  # nothing drawn


def test_adapterhub_takes_the_merged_one(tmp_path: Path) -> None:
    base = of_hub("bert")
    program = randomise(peftfx.run(base, "adamix{adapters=3,bottleneck=4}"), 0.3)
    save_adapter(program, tmp_path / "a", "adapterhub")
    again = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(output(again, "bert"), output(program, "bert"))


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean over rows of (KL(q | p) + KL(p | q)) / 2, term by term."""
    total = 0.0
    for a, b in zip(p.softmax(-1).tolist(), q.softmax(-1).tolist(), strict=True):
        total += sum((x - y) * math.log(x / y) for x, y in zip(a, b, strict=True)) / 2
    return total / len(p)


def test_the_consistency_of_two_forwards(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, SMALL), 0.3).train()
    controllers = peftfx.controllers(program)
    inputs = batch(3, 7, pad=2)
    torch.manual_seed(3)
    with torch.no_grad():
        one, other = program(**inputs), program(**inputs)
    assert not torch.equal(one, other)

    def again(**given: Tensor) -> Tensor:
        assert given.keys() == inputs.keys()
        return other

    real = inputs["attention_mask"].bool()
    got = controllers.loss(one, {**inputs, "more": 1}, again)
    assert float(got) == pytest.approx(divergence(one[real], other[real]), rel=1e-4)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, :4] = 1
    got = controllers.loss(one, {**inputs, "labels": labels}, again)
    assert float(got) == pytest.approx(divergence(one[0, :4], other[0, :4]), rel=1e-4)
    # The targets are held: the gradient is that of the guesses alone.
    x, y = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    controllers.loss(x, inputs, lambda **_: y).backward()
    p, q = x.detach().softmax(-1), y.detach().softmax(-1)
    torch.testing.assert_close(x.grad, (p - q) / 4)
    torch.testing.assert_close(y.grad, (q - p) / 4)


def test_a_loss_without_a_batch_says_what_it_needs(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, SMALL)
    with pytest.raises(PassError, match=r"Give both: controllers.loss\(outputs, batch, program\)"):
        peftfx.controllers(program).loss(program(**batch()))
    off = peftfx.run(base, f"{SMALL[:-1]},consistency=0}}")
    assert peftfx.controllers(off).loss(off(**batch())) == 0.0
    with pytest.raises(PassError, match="no output has rows of logits"):
        peftfx.controllers(program).loss(torch.ones(3), batch(), lambda **_: torch.ones(3))


def test_encoder_decoders_and_images(captured: Any, zoo: Any) -> None:
    _, base, inputs = subject(captured, zoo, "t5")
    program = randomise(peftfx.run(base, SMALL), 0.3)
    assert len(program.history[-1].edited) == 4
    assert moved(first(base(**inputs)), first(program(**inputs))) > 0.01
    assert len(peftfx.run(zoo["vit"], SMALL).history[-1].edited) == 2


LORA = "adamix{form=lora,adapters=3,bottleneck=2,alpha=4,shared_up=false,where=q|v}"


def test_low_rank_experts(captured: Any, tmp_path: Path) -> None:
    """W x + alpha / r B_j A_i x: one drawn in training, the means afterwards, which fold."""
    base = captured.double("decoder")
    fresh, inputs = peftfx.run(base, LORA), batch(4, 11, pad=3)
    assert torch.equal(first(fresh(**inputs)), first(base(**inputs)))
    program = randomise(fresh, 0.3)
    branch: Any = program.branch(program.attachments[0])
    a, b = branch.a.detach(), branch.b.detach()
    assert sum(p.numel() for p in program.trainable_parameters()) == 3 * 2 * 2 * (32 + 32 + 32 + 16)
    x = torch.randn(2, 5, 32).double()
    wanted = [2 * x @ a[i].T @ b[j].T for i in range(3) for j in range(3)]
    found, drawn = set[int](), branch.train()
    torch.manual_seed(0)
    for _ in range(60):
        y = drawn(x)
        found |= {k for k, w in enumerate(wanted) if torch.allclose(y, w)} or {-1}
    assert found == set(range(9))
    branch.eval()
    torch.testing.assert_close(branch(x), 2 * x @ a.mean(0).T @ b.mean(0).T)
    want = first(program(**inputs))
    assert moved(first(base(**inputs)), want) > 0.01
    baked = peftfx.run(program, peftfx.controllers(program).finish())
    assert {type(baked.branch(t)).__name__ for t in baked.attachments} == {"LoRABranch"}
    for one in (baked, peftfx.run(baked, "fold")):
        assert float((first(one(**inputs)) - want).detach().abs().max()) <= 1e-12
    peftfx.save(baked, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**inputs)), first(baked(**inputs)))


def test_each_form_has_its_places(captured: Any) -> None:
    _, base = captured["decoder"]
    with pytest.raises(SelectorError, match=r"stands beside linear sites.*where=linear"):
        peftfx.run(base, "adamix{form=lora,where=ffn and sublayer}")
    with pytest.raises(SelectorError, match="stands beside sublayer sites"):
        peftfx.run(base, "adamix{where=q}")
    with pytest.raises(OptionError, match="rank 40 exceeds 32"):
        peftfx.run(base, "adamix{form=lora,bottleneck=40,where=q}")


def test_bad_options() -> None:
    for options in ("adapters=0", "bottleneck=0", "consistency=-1", "shared_up=2"):
        with pytest.raises(OptionError, match="adamix"):
            peftfx.parse(f"adamix{{{options}}}")
