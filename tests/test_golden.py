"""Golden graph text: what each pass does to a hand-written model, line by line, with edit counts.

The first line of a file is its recipe. `pytest --update-golden` rewrites the rest; review the
difference before committing it.
"""

from __future__ import annotations

from typing import Any

import pytest

import peftfx
from peftfx.rewriter.pipeline.passes import REGISTRY

from .recipes import GOLDEN, RECIPES


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_golden(captured: Any, name: str, request: pytest.FixtureRequest) -> None:
    _, base = captured["decoder"]
    got = f"# {RECIPES[name]}\n{peftfx.run(base, RECIPES[name]).diff()}"
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(got)
    assert path.exists(), f"write `# {name}{{...}}` into {path}, then pytest --update-golden"
    assert path.read_text() == got


def test_no_golden_text_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.iterdir()} == set(REGISTRY)
