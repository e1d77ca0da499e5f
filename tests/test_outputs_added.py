"""Outputs and states that a pass adds: the model's own stay what they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Delta
from peftfx.rewriter.errors import PassError, VerifyError
from peftfx.rewriter.pipeline.passes import REGISTRY, Pass
from peftfx.rewriter.program.history import Contract

from .methods.common import hooked
from .models import batch, randomise

Tap = Callable[..., Pass]


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Generator[Tap]:
    """A pass `tap` by what it does with the editor."""
    monkeypatch.setitem(sys.modules, "tap", ModuleType("tap"))

    def define(apply: Callable[[Any], None], adapter: str | None = None) -> Pass:
        body = {
            "__module__": "tap",
            "adapter": property(lambda self: adapter),
            "contract": Contract("identity" if adapter else "exact"),
            "apply": lambda self, edit, plan: apply(edit),
            "__annotations__": {"contract": ClassVar[Contract]},
        }
        return dataclass(frozen=True, kw_only=True)(type("Tap", (Pass,), body))()

    yield define
    REGISTRY.pop("tap", None)


def hidden(edit: Any) -> None:
    site = next(s for s in edit.program.sites if s.module == "layers.0.fc2")
    edit.add_output("hidden", edit.output(site))


def seen(model: nn.Module, inputs: dict[str, Tensor], module: str = "layers.0.fc2") -> Tensor:
    kept: list[Tensor] = []
    with hooked(model, {module: lambda i, o: kept.append(o)}):
        model(**inputs)
    return kept[0]


def test_a_hidden_state_beside_the_outputs(captured: Any, tap: Tap, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = peftfx.run(base, [tap(hidden)])
    inputs = batch(4, 11, pad=3)
    want, got = base(**inputs), program(**inputs)
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(want, got[:2], strict=True))
    torch.testing.assert_close(got[2], seen(model, inputs))

    adapted = randomise(peftfx.run(program, "lora{where=q|v};prompt_tuning{length=3}"))
    shown = adapted(**inputs)
    assert shown[2].shape == got[2].shape and (shown[2] - got[2]).abs().max() > 0.01
    assert all(c.holds for c in adapted.verify())
    folded = peftfx.run(adapted, "fold{names=[lora]}")
    for a, b in zip(folded(**inputs), shown, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    peftfx.save(adapted, tmp_path / "adapter")
    again = peftfx.load(base, tmp_path / "adapter")(**inputs)
    assert len(again) == 3 and all(torch.equal(a, b) for a, b in zip(again, shown, strict=True))
    peftfx.save_program(folded, tmp_path / "program")
    alone = peftfx.load_program(tmp_path / "program")(**inputs)
    assert torch.equal(alone[2], folded(**inputs)[2])


def test_named_outputs_get_a_name_more(captured: Any, tap: Tap) -> None:
    _, base = captured["llama"]

    def apply(edit: Any) -> None:
        edit.add_output("k0", edit.output(next(s for s in edit.program.sites if s.role == "k")))

    program = peftfx.run(base, [tap(apply)])
    inputs = batch(3, 9)
    want, got = base(**inputs), program(**inputs)
    assert torch.equal(got.logits, want.logits) and torch.equal(got[0], want.logits)
    assert got.k0.shape[:2] == (3, 9) and torch.equal(got["k0"], got[len(got) - 1])


def test_a_single_output_gets_a_name(captured: Any, tap: Tap, tmp_path: Path) -> None:
    """A model that returns one tensor returns `Outputs` then, whose first entry it is."""
    _, base = captured["decoder"]

    def apply(edit: Any) -> None:
        for role in ("k", "v"):
            site = next(s for s in edit.program.sites if s.role == role)
            edit.add_output(role, edit.output(site))

    program = peftfx.run(base, [tap(apply)])
    inputs = batch(3, 9)
    want, got = base(**inputs), program(**inputs)
    assert list(got) == ["output", "k", "v"] and len(got) == 3
    assert torch.equal(got.output, want) and torch.equal(got[0], want)
    assert got.k.shape == got["v"].shape == (3, 9, 16) and not torch.equal(got.k, got.v)
    adapted = randomise(peftfx.run(program, "lora{where=q}"))
    assert all(c.holds for c in adapted.verify())
    assert not torch.equal(adapted(**inputs).output, want)
    ids = inputs["input_ids"]
    tokens = program.generate(ids, max_new_tokens=2)
    assert torch.equal(tokens, base.generate(ids, max_new_tokens=2))
    peftfx.save_program(adapted, tmp_path / "program")
    alone = peftfx.load_program(tmp_path / "program")(**inputs)
    assert torch.equal(alone.output, adapted(**inputs).output)


def test_an_output_that_cannot_be_added(captured: Any, tap: Tap) -> None:
    def single(edit: Any) -> None:
        edit.add_output("output", edit.output(next(iter(edit.program.sites))))

    def twice(edit: Any) -> None:
        edit.add_output("logits", edit.output(next(iter(edit.program.sites))))

    with pytest.raises(PassError, match=r"there is an output 'output' already"):
        peftfx.run(captured["decoder"][1], [tap(single)])
    with pytest.raises(PassError, match="there is an output 'logits' already"):
        peftfx.run(captured["llama"][1], [tap(twice)])


class Decay(nn.Module):
    """`0.5 s + mean of the tokens`: a memory that calls hand on."""

    def forward(self, state: Tensor, seen: Tensor) -> Tensor:
        return 0.5 * state + seen.mean((0, 1))


class Recall(Delta):
    """`B m` beside a linear, with the memory m."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width, width))

    def branch(self, x: Tensor, state: Tensor) -> Tensor:
        return (self.b @ state).expand(*x.shape[:-1], -1)


def remembering(edit: Any, closed: bool = True, width: int = 32) -> None:
    site = edit.program.sites["layers.1.query.weight"]
    state = edit.add_state("memory", torch.zeros(width))
    edit.add(site, Recall(32), state=state)
    if closed:
        seen = edit.input(edit.program.sites["layers.0.query.weight"])
        edit.add_output("memory", edit.share("decay", Decay(), state=state, seen=seen))


def test_a_state_is_handed_on(captured: Any, tap: Tap) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, [tap(remembering, "tap")]), 0.3)
    one, two = batch(2, 7, seed=1), batch(3, 9, seed=2)
    first_memory = seen(model, one, "norm").mean((0, 1))
    before = program(**one)
    assert torch.equal(before[0], base(**one)[0])  # the memory is zero
    torch.testing.assert_close(before[2], first_memory)
    after = program(**two, memory=before[2])
    torch.testing.assert_close(after[2], 0.5 * first_memory + seen(model, two, "norm").mean((0, 1)))
    (b,) = program.trainable_parameters()
    with hooked(model, {"layers.1.query": lambda i, o: o + b @ first_memory}):
        torch.testing.assert_close(after[0], model(**two)[0])
    assert (after[0] - base(**two)[0]).abs().max() > 0.01


def test_a_state_may_begin_with_any_numbers(captured: Any, tap: Tap, tmp_path: Path) -> None:
    """Of a fixed shape, and the same for all samples where it has one row for each."""
    _, base = captured["encoder"]
    initial = torch.arange(32.0)[None] / 7

    def apply(edit: Any) -> None:
        site = edit.program.sites["layers.1.query.weight"]
        state = edit.add_state("memory", initial, sizes={0: "batch"})
        edit.add(site, Rowwise(32), state=state)
        seen = edit.input(edit.program.sites["layers.0.query.weight"])
        edit.add_output("memory", edit.share("decay", DecayRows(), state=state, seen=seen))

    program = randomise(peftfx.run(base, [tap(apply, "tap")]), 0.3)
    one = batch(4, 7, seed=1)
    got, want = program(**one), program(**one, memory=initial.expand(4, 32))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    other = program(**one, memory=torch.zeros(4, 32))
    assert (got[0] - other[0]).abs().max() > 0.01 and not torch.equal(got[2], other[2])
    peftfx.save_program(program, tmp_path / "program")
    again = peftfx.load_program(tmp_path / "program")(**one)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


class Rowwise(Delta):
    """`B m_i` beside a linear, with a memory m of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width, width))

    def branch(self, x: Tensor, state: Tensor) -> Tensor:
        return (state @ self.b.T)[:, None].expand(-1, x.shape[1], -1)


class DecayRows(nn.Module):
    """`0.5 s + mean of the tokens`, a sample at a time."""

    def forward(self, state: Tensor, seen: Tensor) -> Tensor:
        return 0.5 * state + seen.mean(1)


def test_states_that_do_not_close_are_refused(captured: Any, tap: Tap) -> None:
    base = captured["encoder"][1]
    with pytest.raises(PassError, match="the state 'memory' is read, but nothing says"):
        peftfx.run(base, [tap(lambda e: remembering(e, closed=False), "tap")])

    def wider(edit: Any) -> None:
        state = edit.add_state("memory", torch.zeros(1, 32))
        edit.add(edit.program.sites["layers.1.query.weight"], Gain(32), gain=state)
        edit.add_output("memory", edit.input(edit.program.sites["layers.0.query.weight"]))

    message = r"'memory' is f32\[1, 32\], but becomes f32\[batch, sequence, 32\]"
    with pytest.raises(VerifyError, match=message):
        peftfx.run(base, [tap(wider, "tap")])


class Gain(Delta):
    """`(g W) x` beside a linear, with g given for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, width))

    def branch(self, x: Tensor, gain: Tensor) -> Tensor:
        return (x @ self.w.T) * gain


def test_a_conditional_input(captured: Any, tap: Tap) -> None:
    """One number a token, which calls may leave out."""
    model, base = captured["encoder"]

    def apply(edit: Any) -> None:
        sizes = {0: "batch", 1: "sequence"}
        gain = edit.add_input("gain", torch.ones(1, 1, 1), sizes=sizes)
        edit.add(edit.program.sites["layers.1.query.weight"], Gain(32), gain=gain)

    program = randomise(peftfx.run(base, [tap(apply, "tap")]), 0.3)
    assert "gain: f32[batch, sequence, 1]" in str(program.spec)
    inputs, gain = batch(3, 7), torch.randn(3, 7, 1)
    (w,) = program.trainable_parameters()
    for given, factor in (({"gain": gain}, gain), ({}, 1.0)):
        with hooked(model, {"layers.1.query": lambda i, o, f=factor: o + i[0] @ w.T * f}):
            torch.testing.assert_close(program(**inputs, **given)[0], model(**inputs)[0])
    assert (program(**inputs, gain=gain)[0] - program(**inputs)[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("example", "sizes", "message"),
    [
        (torch.ones(0), None, "1 to 65536 numbers of it, but it holds 0"),
        (torch.ones(2), {0: "batch"}, r"is \(2,\), but axis 0 is batch. Give an example of size 1"),
        (torch.ones(1), {0: "frames"}, "no input has a dynamic size 'frames'. .*batch, sequence"),
    ],
)
def test_inputs_that_cannot_be_left_out(
    captured: Any, tap: Tap, example: Tensor, sizes: Any, message: str
) -> None:
    item = tap(lambda e: e.add_input("gain", example, sizes=sizes))
    with pytest.raises(PassError, match=message):
        peftfx.run(captured["encoder"][1], [item])
