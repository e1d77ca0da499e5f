"""SPT: where a budget goes, and that it finds what a teacher changed."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.passes.selective.structured import OutputAdapter
from peftfx.rewriter.errors import MetaTensorError, OptionError

from ..models import Tiny, batch, first, moved, randomise

LAYERS = ("0.weight", "2.weight", "4.weight")


def power(outputs: Any) -> Tensor:
    return first(outputs).pow(3).mean()


def losses(count: int = 3) -> list[Any]:
    return [(batch(2, 5 + i, seed=i), power) for i in range(count)]


def decided(program: peftfx.Program) -> Any:
    return program.history[-1].plan.decisions


def entries(program: peftfx.Program) -> dict[str, Tensor]:
    return {n: t.long() for n, t in program.history[-1].plan.tensors.items()}


# A teacher that differs from the base at known entries.


def planted(
    model: nn.Module, program: peftfx.Program, names: tuple[str, ...], count: int
) -> tuple[dict[str, Tensor], list[Any]]:
    """Entries and their changes, and batches with the distance to what that model gives."""
    generator = torch.Generator().manual_seed(5)
    teacher = copy.deepcopy(model)
    held, places = dict(teacher.named_parameters()), dict[str, Tensor]()
    for name in names:
        where = torch.randperm(held[name].numel(), generator=generator)[:count].sort().values
        places[name] = where
        held[name].view(-1)[where] += 0.8 * torch.randn(count, generator=generator).sign()
    (key,) = program.spec.names
    data: list[Any] = []
    for _ in range(8):
        x = torch.randn(512, 24, generator=generator)
        want = teacher(x)
        data.append(({key: x}, distance(want)))
    return places, data


def distance(want: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda got: (got - want).pow(2).mean()


def fitted(program: peftfx.Program, data: list[Any]) -> float:
    """The last loss of 200 steps."""
    optimizer = torch.optim.Adam(program.trainable_parameters(), lr=0.03)
    loss = torch.zeros(())
    for step in range(200):
        inputs, measure = data[step % len(data)]
        loss = measure(program(**inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_it_finds_planted_entries_and_learns_them() -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 16).eval().requires_grad_(False)
    program = peftfx.capture(model, (torch.randn(4, 24),))
    places, data = planted(model, program, ("weight",), 6)
    chosen = peftfx.run(program, "spt{form=none,budget=6,where=linear}", data=data)
    assert torch.equal(entries(chosen)["weight"], places["weight"]) and len(entries(chosen)) == 1
    assert fitted(chosen, data) < 1e-6
    (a,) = chosen.attachments
    branch: Any = chosen.branch(a)
    torch.testing.assert_close(branch.values.abs(), torch.full((6,), 0.8), rtol=1e-2, atol=0)


def test_in_a_network_it_learns_twice_as_much_as_the_largest_weights() -> None:
    """There, inputs of later layers are not independent, and entries beside a planted one matter,
    too: it finds those of the last layer among three times as many."""
    torch.manual_seed(0)
    sizes = (24, 32, 32, 16)
    parts = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*parts[:-1]).eval().requires_grad_(False)
    program = peftfx.capture(model, (torch.randn(4, 24),))
    places, data = planted(model, program, LAYERS, 4)
    text = "spt{form=none,budget=12,bias=false,where=linear}"
    chosen = peftfx.run(program, text, data=data)
    assert set(places["4.weight"].tolist()) <= set(entries(chosen)["4.weight"].tolist())
    other = peftfx.run(program, text.replace("{", "{score=magnitude,"))
    assert fitted(chosen, data) < 0.6 * fitted(other, data)


# Where the budget goes.


def by_hand(
    program: peftfx.Program, scores: dict[str, Tensor], budget: float, rank: int, alpha: float,
    beta: float,
) -> tuple[float, set[str], dict[str, int]]:  # fmt: skip
    """(parameters, matrices with a LoRA, entries of the others) by trying every threshold."""
    done: tuple[float, set[str], dict[str, int]] = 0, set(), {}
    for threshold in sorted({float(v) for t in scores.values() for v in t.flatten()}, reverse=True):
        if threshold == 0:
            break
        total, modules, counts = 0, set[str](), dict[str, int]()
        for name, score in scores.items():
            n, size = int((score >= threshold).sum()), score.numel()
            price = rank * sum(score.shape)
            if score.dim() == 2 and price < size and n >= price / alpha:
                total += price
                modules.add(name)
            elif score.dim() == 1 and n >= size / beta:
                total += size
                counts[name] = size
            elif n:
                total += n
                counts[name] = n
        if total > budget:
            break
        done = total, modules, counts
    return done


@pytest.mark.parametrize(("budget", "alpha", "beta"), [(700, 10, 5), (1100, 4, 2), (300, 10, 1)])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_budget_goes_where_the_paper_puts_it(
    captured: Any, name: str, budget: int, alpha: float, beta: float
) -> None:
    model, base = captured[name]
    other = copy.deepcopy(model).requires_grad_(True)
    scores: dict[str, Tensor] = {}
    for inputs, loss in losses():
        other.zero_grad()
        loss(other(**inputs)).backward()
        for n, p in other.named_parameters():
            if p.grad is not None and not n.startswith(("embed", "words", "places", "head")):
                scores[n] = scores.get(n, torch.zeros(())) + p.grad**2
    want = by_hand(base, scores, budget, 2, alpha, beta)
    text = f"spt{{budget={budget},rank=2,alpha={alpha},beta={beta}}}"
    program = peftfx.run(base, text, data=losses())
    got = decided(program)
    assert (got["spent"], set(got["modules"]), got["entries"]) == want
    assert want[1] or budget == 300
    trained = sum(p.numel() for p in program.trainable_parameters())
    assert trained == got["spent"] == program.history[-1].certificate.measured["spent"] <= budget
    half = peftfx.run(base, f"spt{{unit=bytes,budget={4 * budget},rank=2}}", data=losses())
    kept = sum(p.nbytes for p in half.trainable_parameters())
    kept += sum(t.nbytes for t in half.history[-1].plan.tensors.values())
    assert kept == decided(half)["spent"] <= 4 * budget


@pytest.mark.parametrize("unit", ["flops", "latency"])
def test_other_units(captured: Any, unit: str) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, f"spt{{budget=0.02,unit={unit},rank=2}}", data=losses())
    about = decided(program)
    assert 0 < about["spent"] <= about["budget"]
    if unit == "flops":
        entries_alone = sum(about["entries"].values())
        sizes = {m: sum(base.module.get_parameter(m).shape) for m in about["modules"]}
        assert about["spent"] == entries_alone + sum(2 * 128 * 2 * s for s in sizes.values())


# What is inserted.


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_it_equals_the_reference(captured: Any, form: str) -> None:
    model, base = captured["encoder"]
    text = f"spt{{budget=1100,rank=2,form={form},dropout=0}}"
    program = peftfx.run(base, text, data=losses())
    assert decided(program)["modules"] and torch.equal(
        first(program(**batch())), first(base(**batch()))
    )
    randomise(program, 0.2)
    other = copy.deepcopy(model)
    held = dict(other.named_parameters())
    for a in program.attachments:
        branch: Any = program.branch(a)
        if a.slot == "expression":
            name = a.path.removeprefix("peftfx.spt.").removesuffix(".expression")
            with torch.no_grad():
                held[name].view(-1)[branch.indices.long()] += branch.values
        elif form == "lora":
            with torch.no_grad():
                held[a.site].add_(branch.b @ branch.a)
        else:
            assert isinstance(branch, OutputAdapter)

            def behind(_: nn.Module, __: Any, z: Tensor, p: Any = branch) -> Tensor:
                return z + F.gelu(z @ p.down.T + p.down_bias) @ p.up.T + p.up_bias

            other.get_submodule(a.site.removesuffix(".weight")).register_forward_hook(behind)
    got, want = first(program(**batch())), first(other(**batch())).detach()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert moved(first(base(**batch())), got) > 0.01
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-5)
    left = {type(folded.branch(a)).__name__ for a in folded.attachments}
    assert left == (set() if form == "lora" else {"OutputAdapter"})


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_fused_projections_are_parted_and_tied_weights_are_not(captured: Any, form: str) -> None:
    _, fused = captured["fused"]
    data = [({"input_ids": b["input_ids"]}, f) for b, f in losses()]
    program = peftfx.run(fused, f"spt{{budget=900,rank=2,form={form},where=q|k|v|o}}", data=data)
    modules = decided(program)["modules"]
    parts = [m for m in modules if "qkv" in m]
    assert bool(parts) == (form == "lora") and modules
    _, tied = captured["tied"]
    where = "where=head|embedding|ffn"
    program = peftfx.run(tied, f"spt{{budget=0.4,rank=1,form={form},{where}}}", data=losses())
    assert not any("head" in m or "embed" in m for m in decided(program)["modules"])
    assert any("embed" in n for n in entries(program))
    alone = peftfx.run(tied, f"spt{{budget=0.4,rank=1,form={form},where=head}}", data=losses())
    assert not decided(alone)["modules"] and sum(map(len, entries(alone).values())) > 64
    randomise(program, 0.1)
    want = first(program(**batch()))
    if form == "lora":
        torch.testing.assert_close(first(peftfx.run(program, "fold")(**batch())), want)


def test_saved_plans_need_no_data(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "spt{budget=900,rank=2}", data=losses()))
    assert decided(program)["modules"] and entries(program)
    json.dumps(decided(program), allow_nan=False)
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(base, tmp_path / "a")
    assert torch.equal(first(loaded(**batch())), first(program(**batch())))
    assert decided(loaded) == decided(program)
    assert all(c.holds for c in loaded.verify())


def test_bad_input_changes_nothing(captured: Any) -> None:
    _, base = captured["tiny"]
    text = base.text()
    with pytest.raises(OptionError, match=r"budget of 7 is below the 8 .*Give at least"):
        peftfx.run(base, "spt{budget=7,unit=bytes}", data=losses())
    with pytest.raises(OptionError, match="needs batches with a loss"):
        peftfx.run(base, "spt")
    with pytest.raises(OptionError, match="data is empty"):
        peftfx.run(base, "spt", data=iter([]))
    with pytest.raises(OptionError, match=r"no entry has a score above zero.*Give batches"):
        peftfx.run(base, "spt{budget=9}", data=[(batch(), lambda y: 0 * first(y).sum())])
    for wrong in ("budget=0", "rank=0", "alpha=0.5", "beta=0", "unit=joules", "dropout=1"):
        with pytest.raises(OptionError, match=wrong.partition("=")[0]):
            peftfx.parse(f"spt{{{wrong}}}")
    with torch.device("meta"):
        model = Tiny().eval()
    hollow = peftfx.capture(model, kwargs=batch())
    with pytest.raises(MetaTensorError, match="Load the weights"):
        peftfx.run(hollow, "spt", data=losses())
    assert base.text() == text
