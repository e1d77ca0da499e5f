"""Every pair of methods: composes as `docs/stacks.md` says, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx

from .cpu import shared
from .models import batch, first, moved
from .recipes import METHODS
from .stacks import MODEL, PAGE, PAIRS, chosen, known, render, slots, stack

REFRESH = "Run `python -m tests.stacks {}`, and read what it wrote into docs/stacks.md."


@pytest.fixture(scope="module")
def pairs(captured: Any, seed: int) -> set[tuple[str, str]]:
    with shared():
        return chosen({name: slots(captured.placed(MODEL, name)) for name in METHODS}, seed)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_stack(
    captured: Any, pairs: Any, pair: tuple[str, str], tmp_path: Path, request: Any
) -> None:
    if pair not in pairs and not request.config.getoption("--stacks"):
        pytest.skip("its slots meet in another pair: run pytest --stacks for all")
    _, base = captured[MODEL]
    made = stack(lambda name: captured.placed(MODEL, name), *pair)
    cell = known().get(pair, made.cell)  # what the page lacks, the test of the page says
    assert cell == made.cell, (REFRESH.format(pair[0]), made.errors)
    for program in made.programs[:1]:
        want = first(program(**batch()))
        assert moved(first(base(**batch())), want) > 0.01
        folded = peftfx.run(program, "fold")
        assert folded.history[-1].certificate.holds
        torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-4)
        peftfx.save(program, tmp_path / "both")
        assert torch.equal(first(peftfx.load(base, tmp_path / "both")(**batch())), want)


def test_the_page_is_fresh() -> None:
    cells = known()
    lacking = {second for pair in set(PAIRS) - set(cells) for second in pair}
    lacking -= {name for pair in cells for name in pair}
    message = REFRESH.format(" ".join(sorted(lacking)))
    assert not set(PAIRS) - set(cells), message
    assert PAGE.read_text(encoding="utf-8") == render(cells), message
