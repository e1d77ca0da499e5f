"""SAM against its objective, tried over all masks, and against a plain sparse reference."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import MetaTensorError, NonFiniteError, OptionError, PassError
from peftfx.rewriter.run.run import apply_plan

from ..models import Tiny, batch, first, moved, randomise

GRADIENTS = ("gradient", "squared", "newton")


def power(outputs: Any) -> Tensor:
    return first(outputs).pow(3).mean()


def losses(count: int = 3, **more: Any) -> list[Any]:
    return [({**batch(2, 5 + i, seed=i), **more}, power) for i in range(count)]


def entries(program: peftfx.Program) -> dict[str, Tensor]:
    """Stored tensor -> the flat places that train."""
    return {n: t.long() for n, t in program.history[-1].plan.tensors.items()}


def reference(model: nn.Module, program: peftfx.Program) -> nn.Module:
    """The plain model with theta + scatter(values)."""
    other = copy.deepcopy(model)
    held = dict(other.named_parameters())
    with torch.no_grad():
        for a in program.attachments:
            branch: Any = program.branch(a)
            name = a.path.removeprefix("peftfx.sam.").removesuffix(".expression")
            held[name].view(-1)[branch.indices.long()] += branch.values
    return other


@pytest.mark.parametrize("score", GRADIENTS)
@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_a_step_of_the_chosen_entries_lowers_the_quadratic_most(score: str, scope: str) -> None:
    """Of all masks of as many entries, by the objective that the paper minimises."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).eval().requires_grad_(False)
    program = peftfx.capture(model, (torch.randn(2, 3),))
    data = [({"input": torch.randn(4, 3)}, lambda y: y.pow(3).mean()) for _ in range(4)]
    slopes = []
    for inputs, loss in data:
        held = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        value = loss(torch.func.functional_call(model, held, (inputs["input"],)))
        each = torch.autograd.grad(value, list(held.values()))
        slopes.append(torch.cat([g.flatten() for g in each]))
    g = torch.stack(slopes)
    slope = g.pow(2).sum(0).sqrt() if score == "squared" else g.sum(0)
    curvature = g.pow(2).sum(0) if score == "newton" else torch.ones(8)

    def lowest(mask: tuple[int, ...]) -> float:
        """min over d of g^T M d + (M d)^T H (M d) / 2, at its stationary point."""
        chosen = list(mask)
        d = -slope[chosen] / curvature[chosen]
        return float(slope[chosen] @ d + 0.5 * (curvature[chosen] * d) @ d)

    text = f"sam{{score={score},scope={scope},density=0.5,where=linear}}"
    got = entries(peftfx.run(program, text, data=data))
    flat = {*got["weight"].tolist(), *(6 + i for i in got["bias"].tolist())}
    masks = itertools.combinations(range(8), 4)
    allowed = masks if scope == "all" else (m for m in masks if sum(i < 6 for i in m) == 3)
    assert flat == set(min(allowed, key=lowest))


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused"])
def test_it_equals_the_reference(captured: Any, name: str) -> None:
    model, base = captured[name]
    inputs = {n: t for n, t in batch(3, 9).items() if n in base.spec.names}
    data = [({n: t for n, t in b.items() if n in base.spec.names}, f) for b, f in losses()]
    program = peftfx.run(base, "sam{density=0.02,score=squared}", data=data)
    assert program.history[-1].certificate.kind == "identity"
    assert torch.equal(first(program(**inputs)), first(base(**inputs)))
    randomise(program, 0.3)
    got, want = first(program(**inputs)), first(reference(model, program)(**inputs)).detach()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert moved(first(base(**inputs)), got) > 0.01
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-5, atol=1e-5)


def test_counts_and_what_an_optimiser_holds(captured: Any) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, "sam{density=0.003}", data=losses())
    sizes = {n: base.module.get_parameter(n).numel() for n in entries(program)}
    want = {n: max(1, round(0.003 * size)) for n, size in sizes.items()}
    assert want == program.history[-1].plan.decisions["entries"]
    assert {n: len(t) for n, t in entries(program).items()} == want and min(want.values()) == 1
    assert sum(p.numel() for p in program.trainable_parameters()) == sum(want.values())
    groups = peftfx.controllers(program).param_groups(lr=0.1, weight_decay=0.1)
    assert all(g["weight_decay"] == 0 for g in groups)
    optimizer = torch.optim.AdamW(groups)
    power(program(**batch())).backward()
    optimizer.step()
    held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert held == 2 * sum(want.values())
    folded = peftfx.run(program, "fold").export_state_dict()
    for name, tensor in base.export_state_dict().items():
        changed = (folded[name] != tensor).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(entries(program).get(name, torch.empty(0)).tolist())
    together = peftfx.run(base, "sam{density=0.01,scope=all}", data=losses())
    every = sum(sizes.values())
    assert sum(p.numel() for p in together.trainable_parameters()) == round(0.01 * every)


def test_saved_plans_need_no_data_and_hold_what_changed(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "sam{density=0.01}", data=losses()))
    json.dumps(program.history[-1].plan.decisions, allow_nan=False)
    assert all(t.dtype == torch.int32 for t in program.history[-1].plan.tensors.values())
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(base, tmp_path / "a")
    assert torch.equal(first(loaded(**batch())), first(program(**batch())))
    assert loaded.history[-1].plan.decisions == program.history[-1].plan.decisions
    size = (tmp_path / "a" / "tensors.safetensors").stat().st_size
    count = sum(p.numel() for p in program.trainable_parameters())
    assert 8 * count < size < 8 * count + 300 * len(entries(program))
    again = peftfx.run(program.without("sam"), "sam{density=0.01}", data=losses())
    assert entries(again).keys() == entries(program).keys()
    assert all(torch.equal(t, entries(program)[n]) for n, t in entries(again).items())


def test_what_no_batch_moves_is_left_alone(captured: Any) -> None:
    """The pooler, of which the loss reads nothing; and weights in few bits have no gradients."""
    _, base = captured["encoder"]
    program = peftfx.run(base, "sam", data=losses())
    reasons = dict(program.history[-1].skipped)
    assert "no entry of pooler." in reasons["pooler.weight"]
    assert not any("pooler" in n for n in entries(program))
    few = peftfx.run(base, "quantise{where=q}")
    program = peftfx.run(few, "sam", data=losses())
    assert "stored in few bits" in dict(program.history[-1].skipped)["layers.0.query.weight"]
    assert entries(peftfx.run(few, "sam{score=magnitude}"))["layers.0.query.weight"].numel() == 5
    with pytest.raises(OptionError, match=r"can be scored by score=squared.*few bits.*Choose"):
        peftfx.run(few, "sam{score=squared,where=q,bias=false}", data=losses())


def test_entries_that_full_tuning_moved_most(captured: Any) -> None:
    _, base = captured["decoder"]
    tuned = randomise(peftfx.run(base, "train{where=q|v}"), 0.1)
    program = peftfx.run(base, "sam{score=change,density=0.05}", sources=[tuned])
    for name, own in entries(program).items():
        change = (tuned.module.get_parameter(name) - base.module.get_parameter(name)).abs()
        want = change.detach().flatten().topk(own.numel()).indices.sort().values
        assert torch.equal(own, want) and own.numel() == round(0.05 * change.numel())
    assert len(entries(program)) == 4  # the others did not move
    with pytest.raises(OptionError, match=r"Give it: run\(program, \.\.\., sources=\[tuned\]"):
        peftfx.run(base, "sam{score=change}")
    with pytest.raises(OptionError, match=r"the tuned program has no .*Give one of the same base"):
        peftfx.run(base, "sam{score=change}", sources=[captured["encoder"][1]])


def test_bad_input_changes_nothing(captured: Any) -> None:
    _, base = captured["tiny"]
    text = base.text()
    with pytest.raises(OptionError, match="needs batches with a loss"):
        peftfx.run(base, "sam")
    with pytest.raises(OptionError, match="data is empty"):
        peftfx.run(base, "sam", data=[])
    with pytest.raises(NonFiniteError, match="the loss of batch 0 is inf"):
        peftfx.run(base, "sam", data=[(batch(), lambda y: first(y).sum() / 0)])
    with pytest.raises(OptionError, match="depends on none"):
        peftfx.run(base, "sam", data=[(batch(), lambda y: first(y).detach().sum())])
    with pytest.raises(OptionError, match=r"density=1e-06 of .* is less than one. Choose at least"):
        peftfx.run(base, "sam{density=1e-6,scope=all}", data=losses())
    for wrong in ("density=0", "density=1.5", "score=hessian", "scope=layer"):
        with pytest.raises(OptionError, match=wrong.partition("=")[0]):
            peftfx.parse(f"sam{{{wrong}}}")
    with torch.device("meta"):
        model = Tiny().eval()
    hollow = peftfx.capture(model, kwargs=batch())
    with pytest.raises(MetaTensorError, match="Load the weights"):
        peftfx.run(hollow, "sam{score=magnitude}")
    assert base.text() == text


def test_altered_plans_are_refused(captured: Any) -> None:
    _, base = captured["tiny"]
    record = peftfx.run(base, "sam{score=magnitude,where=head}").history[-1]
    name = next(iter(record.plan.tensors))
    size = base.module.get_parameter(name).numel()
    for places in ([-1], [size], [0, 0], [], [0.5]):
        plan = copy.copy(record.plan)
        object.__setattr__(plan, "tensors", {**record.plan.tensors, name: torch.tensor(places)})
        with pytest.raises(PassError, match=r"no different places in .*save the adapter again"):
            apply_plan(base, record.applied, plan, check=False)
