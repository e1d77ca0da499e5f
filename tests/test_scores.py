"""Scores of stored tensors over batches, and budgets spent on them: against plain autograd and
against all choices that there are."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.edits.linear.sparse import Part, SparseDelta
from peftfx.rewriter.errors import MetaTensorError, NonFiniteError, OptionError
from peftfx.rewriter.scores.allocate import Form, best, largest, most
from peftfx.rewriter.scores.cost import cost
from peftfx.rewriter.scores.entries import OF_GRADIENTS, Place, entry_scores, spend
from peftfx.rewriter.scores.gradients import gradient_sums, gradients

from .models import Tiny, batch, first

UNITS = ("parameters", "bytes", "flops", "latency")


def power(outputs: Any) -> Tensor:
    return first(outputs).pow(3).mean()


def losses(count: int = 3) -> list[Any]:
    return [(batch(2, 5 + i, seed=i), power) for i in range(count)]


def slopes(model: nn.Module) -> list[dict[str, Tensor]]:
    """Gradients of each batch, by plain autograd."""
    held = dict(model.named_parameters())
    found: list[dict[str, Tensor]] = []
    for inputs, loss in losses():
        for p in held.values():
            p.requires_grad_(True)
        each = torch.autograd.grad(loss(model(**inputs)), list(held.values()))
        found.append(dict(zip(held, each, strict=True)))
    return found


# Gradients.


def test_sums_are_those_of_plain_autograd(captured: Any) -> None:
    _, program = captured["tiny"]
    model = Tiny().eval()
    model.load_state_dict(program.export_state_dict())
    each = slopes(model)
    names = list(program.base_tensors())[::-1]
    names = [n for n in names if n in each[0]]
    g = {n: torch.stack([s[n] for s in each]) for n in names}
    want = {
        "gradient": {n: t.sum(0) ** 2 for n, t in g.items()},
        "squared": {n: (t**2).sum(0) for n, t in g.items()},
        "newton": {n: t.sum(0) ** 2 / (t**2).sum(0).clamp(min=1e-38) for n, t in g.items()},
    }
    assert want.keys() == OF_GRADIENTS.keys()
    before = {n: t.clone() for n, t in program.base_tensors().items()}
    flags = [p.requires_grad for p in program.module.parameters()]
    for score, its in want.items():
        got = dict(entry_scores(program, names, score, iter(losses())))
        assert list(got) == names
        for name in names:
            torch.testing.assert_close(got[name], its[name], rtol=1e-3, atol=1e-12)
    sums = gradients(program, losses(), names)
    torch.testing.assert_close(sums, {n: t.sum(0) for n, t in g.items()})
    assert flags == [p.requires_grad for p in program.module.parameters()]
    assert not any(p.grad is not None for p in program.module.parameters())
    assert all(torch.equal(t, before[n]) for n, t in program.base_tensors().items())


def test_parts_that_have_room_give_the_same_sums(captured: Any) -> None:
    _, program = captured["tiny"]
    names = [n for n, _ in program.module.named_parameters()]
    ran: list[int] = []

    def counted() -> Iterator[Any]:
        for item in losses():
            ran.append(1)
            yield item

    whole = dict(gradient_sums(program, counted(), names, Tensor.square))
    assert len(ran) == 3
    parts = dict(gradient_sums(program, counted(), names, Tensor.square, room=4000))
    assert len(ran) == 6  # an iterator is read once, whatever is run again
    assert list(whole) == list(parts) == names
    torch.testing.assert_close(whole, parts)


def test_there_is_one_gradient_at_a_time(captured: Any) -> None:
    _, program = captured["decoder"]
    names = [n for n, _ in program.module.named_parameters()]
    alive: list[weakref.ref[Tensor]] = []
    seen = 0

    def reduce(gradient: Tensor) -> Tensor:
        nonlocal seen
        assert not any(r() is not None for r in alive), "the gradient before is still held"
        alive[:] = [weakref.ref(gradient)]
        seen += 1
        return gradient.sum()

    sums = dict(gradient_sums(program, losses(2), names, reduce))
    assert seen == 2 * len(names) == 2 * len(sums)


def test_sums_of_half_precision_are_wide() -> None:
    torch.manual_seed(0)
    model = Tiny().eval().to(torch.bfloat16)
    program = peftfx.capture(model, kwargs=batch())
    sums = dict(gradient_sums(program, losses(), ["head.weight"], Tensor.square))
    assert sums["head.weight"].dtype == torch.float32


class Gone(nn.Module):
    """A linear whose output nothing reads stands beside one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


def test_what_says_nothing_is_refused_and_nothing_is_lost() -> None:
    program = peftfx.capture(Gone().eval(), kwargs={"x": torch.randn(2, 4)})
    text, names = program.text(), ["one.weight"]

    def asked(
        loss: Any, of: Sequence[str] = names, x: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        inputs = {"x": torch.randn(2, 4) if x is None else x}
        return gradients(program, [(inputs, lambda out: out[0].sum()), (inputs, loss)], of)

    def zeros(out: Any) -> Tensor:
        return (0 * out[0]).sum().sqrt()

    with pytest.raises(OptionError, match=r"batch 1 depends on none of the 1 .*Give a loss"):
        asked(lambda out: out[0].detach().sum())
    with pytest.raises(NonFiniteError, match=r"the loss of batch 1 is nan.*Leave the batch out"):
        asked(lambda out: out[0].sum() * math.nan)
    with pytest.raises(NonFiniteError, match=r"gradients of one\.weight hold NaN.*Give batches"):
        asked(zeros)
    with pytest.raises(OptionError, match=r"depends on none of the 1 tensors .*other\.weight"):
        asked(lambda out: out[0].sum(), ["other.weight"])
    mine = torch.ones((), requires_grad=True)
    with pytest.raises(OptionError, match=r"depends on none"):
        gradients(program, [({"x": torch.randn(2, 4)}, lambda out: mine * 2)], names)
    for data, said in ((None, "needs batches"), ([], "data is empty"), ([3], "a mapping")):
        with pytest.raises(OptionError, match=said):
            gradients(program, data, names)
    unread = asked(lambda out: out[0].sum(), ["one.weight", "other.weight"])
    assert float(unread["one.weight"].abs().sum()) > 0 and not unread["other.weight"].any()
    assert program.text() == text and not any(
        p.grad is not None for p in program.module.parameters()
    )


def test_without_values_there_are_no_scores() -> None:
    with torch.device("meta"):
        model = Tiny().eval()
    hollow = peftfx.capture(model, kwargs=batch())
    for score, data in (("squared", losses()), ("magnitude", None)):
        with pytest.raises(MetaTensorError, match="Load the weights"):
            dict(entry_scores(hollow, ["head.weight"], score, data))


# Budgets.


def test_the_largest_come_from_one_tensor_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    every = {str(i): torch.randint(9, (5, 7), generator=generator).float() for i in range(6)}
    alive: list[weakref.ref[Tensor]] = []

    def streamed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in every.items():
            made = tensor.clone()
            alive.append(weakref.ref(made))
            yield name, made
            del made
            assert sum(r() is not None for r in alive) <= 1

    pool = torch.cat([t.flatten() for t in every.values()])
    for count in (0, 1, 40, 209, 210, 300):
        got = largest(streamed(), count)
        order = pool.argsort(descending=True, stable=True)[:count].sort().values
        want = {n: order[(order >= 35 * i) & (order < 35 * i + 35)] - 35 * i
                for i, n in enumerate(every)}  # fmt: skip
        assert all(torch.equal(got[n], want[n]) for n in every)
    assert largest(iter([]), 3) == {}
    with pytest.raises(NonFiniteError, match=r"\(bad\)"):
        largest([("good", pool), ("bad", torch.tensor([math.inf]))], 3)


def test_the_most_for_a_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = [torch.randint(5, (n,), generator=generator).float() for n in (3, 0, 6)]
        costs = [torch.randint(1, 4, (len(s),), generator=generator) for s in scores]
        flat, price = torch.cat(scores), torch.cat(costs)
        for budget in (0, 1, 5, 9, 100):
            left, want = budget, torch.zeros(9, dtype=torch.bool)
            for i in sorted(range(9), key=lambda i: (-float(flat[i]), i)):
                left -= int(price[i])
                if left < 0:
                    break
                want[i] = True
            got = most(scores, budget, costs)
            assert [len(g) for g in got] == [3, 0, 6] and torch.equal(torch.cat(got), want)
            assert sum(int(m.sum()) for m in most(scores, budget)) == min(budget, 9)


def brute(forms: Mapping[str, Sequence[Form]], budget: float) -> tuple[float, float]:
    """(largest worth, its least cost) of all choices."""
    sums = (
        (sum(f.worth for f in chosen), sum(f.cost for f in chosen))
        for chosen in itertools.product(*forms.values())
    )
    return max(((w, -c) for w, c in sums if c <= budget))


@pytest.mark.parametrize("unit", UNITS)
def test_the_best_forms_are_those_of_all_choices(unit: Any) -> None:
    """Of LoRAs of several ranks beside six weights, by what each costs in the unit."""
    generator = torch.Generator().manual_seed(0)
    forms: dict[str, list[Form]] = {}
    for i in range(6):
        size, out = (int(n) for n in torch.randint(8, 40, (2,), generator=generator))
        forms[str(i)] = [Form(0.0, 0.0)]
        for rank in (1, 2, 5):
            a, b = torch.zeros(rank, size), torch.zeros(out, rank)
            price = cost(LoRABranch(a, b, 1.0, 0.0), [torch.zeros(16, size)], unit)
            worth = float(torch.rand((), generator=generator)) * rank**0.5
            forms[str(i)].append(Form(worth, price))
    whole = sum(max(f.cost for f in options) for options in forms.values())
    for share in (0, 0.1, 0.31, 0.5, 0.77, 1):
        chosen = best(forms, share * whole)
        assert list(chosen) == list(forms)
        taken = [forms[n][i] for n, i in chosen.items()]
        assert sum(f.cost for f in taken) <= share * whole * (1 + 1e-9)
        assert sum(f.worth for f in taken) == pytest.approx(brute(forms, share * whole)[0])


def test_the_best_forms_of_odd_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    for trial in range(40):
        forms: dict[str, list[Form]] = {}
        for i in range(5):
            numbers = torch.randint(-3, 6, (4, 2), generator=generator).tolist()
            scale = 0.1 if trial % 2 else 1  # sums of tenths are not what they seem
            forms[str(i)] = [Form(w * scale, abs(c) * scale) for w, c in numbers]
        for budget in (4, 7.5, 11):
            least = sum(min(f.cost for f in options) for options in forms.values())
            if least > budget:
                with pytest.raises(OptionError, match=r"is below the .* Give at least"):
                    best(forms, budget)
                continue
            taken = [forms[n][i] for n, i in best(forms, budget).items()]
            worth, price = brute(forms, budget + 1e-9)
            assert sum(f.worth for f in taken) == pytest.approx(worth)
            assert sum(f.cost for f in taken) == pytest.approx(-price)
    with pytest.raises(OptionError, match="must be finite"):
        best({"a": [Form(math.nan, 1)]}, 3)
    assert best({}, 1) == {}


def test_many_places_take_little_time() -> None:
    """As many as a large model has, by dynamic programming over all whole costs, too."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(1, 60, (300, 4), generator=generator).cumsum(1)
    worths = torch.rand(300, 4, generator=generator).cumsum(1)
    forms = {
        str(i): [Form(float(w), float(c)) for w, c in zip(worths[i], drawn[i], strict=True)]
        for i in range(300)
    }
    budget = 20_000
    table = torch.full((budget + 1,), -math.inf, dtype=torch.float64)
    table[0] = 0
    for options in forms.values():
        table = torch.stack([
            torch.cat([table.new_full((int(f.cost),), -math.inf), table[: -int(f.cost)] + f.worth])
            for f in options
        ]).amax(0)  # fmt: skip
    taken = [forms[n][i] for n, i in best(forms, budget).items()]
    assert sum(f.cost for f in taken) <= budget
    assert sum(f.worth for f in taken) == pytest.approx(float(table.max()), rel=1e-9)


def test_costs_are_what_formulas_say() -> None:
    module = LoRABranch(torch.zeros(3, 10), torch.zeros(20, 3), 1.0, 0.5).train()
    x = torch.zeros(7, 10)
    assert cost(module, [x], "parameters") == 3 * (10 + 20)
    assert cost(module, [x], "bytes") == 4 * 3 * (10 + 20)
    assert cost(module, [x], "flops") == 2 * 7 * 3 * (10 + 20)
    assert module.training
    small, large = (cost(nn.Linear(n, n), [torch.zeros(64, n)], "latency") for n in (16, 1024))
    assert 0 < 3 * small < large
    sparse = SparseDelta(torch.arange(5, dtype=torch.int32), torch.zeros(5))
    assert cost(sparse, [], "bytes") == 5 * 8 and cost(sparse, [], "parameters") == 5


def literally(
    places: Sequence[Place], scores: Mapping[str, Tensor], budget: float
) -> tuple[float, list[Any]]:
    """The threshold, tried at every score: counts above it, a form where they reach its turn."""
    taken: tuple[float, list[Any]] = (0.0, [])
    every = sorted({float(v) for t in scores.values() for v in t.flatten() if v > 0}, reverse=True)
    for threshold in every:
        total, forms = 0.0, list[Any]()
        for place in places:
            count = int((place.part.own(scores[place.part.name]) >= threshold).sum())
            turned = bool(place.form) and count >= place.turn
            total += place.cost if turned else count * place.entry
            forms.append("form" if turned else count)
        if total > budget:
            break
        taken = total, forms
    return taken


def test_a_budget_is_spent_as_by_trying_every_threshold() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [Part((), "a", (6, 8)), Part((), "b", (8, 6), 1, (0, 2, 3)), Part((), "c", (10,))]
    for entry in (1.0, 8.0):
        places = [
            Place(parts[0], entry, "lora", 20 * entry, 4), Place(parts[1], entry),
            Place(parts[2], entry, "whole", 10 * entry, 5),
        ]  # fmt: skip
        scores = {p.name: torch.rand(p.shape, generator=generator) for p in parts}
        for name in scores:
            scores[name][0] = 0
        for budget in (1, 3, 5, 8, 14, 30, 47, 1000):
            spent = spend(places, scores.items(), budget * entry)
            total, forms = literally(places, scores, budget * entry)
            assert spent.cost == pytest.approx(total)
            counts = {id(p): len(i) for p, i in spent.entries}
            got = ["form" if p in spent.forms else counts.get(id(p), 0) for p in places]
            assert got == forms
            for place, index in spent.entries:
                own = place.part.own(scores[place.part.name]).flatten()
                chosen = own[index]
                rest = own[[i for i in range(len(own)) if i not in index.tolist()]]
                assert float(chosen.min()) > float(rest.max())
    with pytest.raises(OptionError, match=r"budget of 7 is below the 8 .* Give at least"):
        spend(places, scores.items(), 7)
    with pytest.raises(OptionError, match="no entry has a score above zero"):
        spend(places, [(n, torch.zeros_like(t)) for n, t in scores.items()], 80)
    scores["b"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"\(b\)"):
        spend(places, scores.items(), 80)
