"""What every registered method gets for free; each method's own tests are in `tests/methods/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx

from .models import batch, first, moved, randomise
from .recipes import METHODS, least_change, turn


def theirs(method: str) -> str:
    """The model of another library that a method runs on here, by its name; `test_zoo_methods` runs
    it on one of three such, and on others."""
    return ("bert", "llama")[turn(method) % 2]


CASES = [(m, base) for m in METHODS for base in ("encoder", "decoder", theirs(m))]


@pytest.mark.parametrize(("method", "base_name"), CASES)
def test_declared_effect_and_trainable_set(captured: Any, method: str, base_name: str) -> None:
    before, _ = captured.start(base_name, method)
    program = captured.placed(base_name, method)
    kind = program.history[-1].certificate.kind
    change = moved(first(before(**batch())), first(program(**batch())))
    assert {"identity": change == 0, "near": change < 0.1, "trainable": change > 0}[kind]
    assert program.adapters[-1] == method
    assert program.history[-1].edited
    if base_name != "decoder":  # replays all: once on ours, once on another's model
        assert all(c.holds for c in program.verify())


@pytest.mark.parametrize(("method", "base_name"), [c for c in CASES if c[1] != "decoder"])
def test_training_touches_only_what_trains(captured: Any, method: str, base_name: str) -> None:
    _, base = captured[base_name]
    program = captured.placed(base_name, method).train()
    trained = program.named_trainable_parameters()
    before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        loss = first(program(**batch(seed=step))).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {n for n, p in program.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= set(trained)
    assert len(changed) >= 0.6 * len(trained)
    owner = dict(base.module.named_parameters())
    assert all(torch.equal(owner[n], before[n]) for n in owner.keys() & before if n not in trained)


@pytest.mark.parametrize("base_name", ["encoder", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_save_load_replay_and_removal(
    captured: Any, method: str, base_name: str, tmp_path: Path
) -> None:
    model, base = captured[base_name]
    program = randomise(captured.placed(base_name, method))
    want = first(program(**batch()))
    assert moved(first(base(**batch())), want) > least_change(method, base_name)
    peftfx.save(program, tmp_path / "a")
    # A model is captured at the sizes that the artifact names: alike, where the inputs are.
    for target in (base,) if program.spec.names == base.spec.names else (base, model):
        loaded = peftfx.load(target, tmp_path / "a")
        assert torch.equal(first(loaded(**batch())), want)
        assert loaded.text() == program.text()
    assert torch.equal(first(program.only(program.adapters)(**batch())), want)
    bare = program.only(())
    assert torch.equal(first(bare(**batch())), first(model(**batch())))
    if program.adapters == (method,):
        assert torch.equal(first(program.without(method)(**batch())), first(model(**batch())))


@pytest.mark.parametrize(("method", "base_name"), CASES)
def test_padding_and_sizes_do_not_matter(captured: Any, method: str, base_name: str) -> None:
    program = randomise(captured.placed(base_name, method))
    both = batch(2, 11, pad=6)
    together = first(program(**both))
    for row, length in ((0, 5), (1, 11)):
        alone = {n: t[row : row + 1, :length] for n, t in both.items()}
        got = first(program(**alone))
        torch.testing.assert_close(together[row : row + 1, :length], got, rtol=1e-4, atol=1e-5)
