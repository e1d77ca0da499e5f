"""Every pair of methods: composes as `docs/stacks.md` says, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx

from .models import batch, first, moved
from .stacks import PAGE, PAIRS, known, render, stack

REFRESH = "run `python -m tests.stacks`, and read what it wrote"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_stack(captured: Any, pair: tuple[str, str], tmp_path: Path) -> None:
    _, base = captured["decoder"]
    made = stack(base, *pair)
    assert known().get(pair, "no cell yet") == made.cell, (REFRESH, made.errors)
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
    assert not set(PAIRS) - set(cells), REFRESH
    assert PAGE.read_text(encoding="utf-8") == render(cells), REFRESH
