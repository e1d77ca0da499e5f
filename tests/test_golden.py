"""Golden graph text: what each pass does to a hand-written model, line by line, with edit counts.

The first line of a file is its recipe. `pytest --update-golden` rewrites the rest; review the
difference before committing it. Lines that differ only in a size that grew (`sequence + 3` behind a
prompt) are counted in the end instead of shown.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from typing import Any

import pytest

import peftfx
from peftfx.rewriter.pipeline.passes import REGISTRY

from .recipes import GOLDEN, RECIPES

TEXTS = sorted(n for n, cls in REGISTRY.items() if not cls.sourced)
GROWN = re.compile(r"\b(?P<size>[a-z]\w*) \+ \d+\b")


def difference(base: peftfx.Program, program: peftfx.Program) -> str:
    """The program's diff, without lines of the base in which only sizes grew."""
    old, new = base.text().splitlines(), program.text().splitlines()
    lines: list[str] = []
    sizes: Counter[str] = Counter()
    for line in new:
        before = GROWN.sub(r"\g<size>", line)
        if before != line and before in old:
            sizes.update({f"{m[0]} for {m['size']}" for m in GROWN.finditer(line)})
            line = before
        lines.append(line)
    if not sizes:
        return program.diff()
    changes = list(difflib.unified_diff(old, lines, lineterm="", n=2))[2:]
    grown = [f"sizes: {count} lines have {size}" for size, count in sorted(sizes.items())]
    return "\n".join([*changes, *grown, program.diff().splitlines()[-1]]) + "\n"


@pytest.mark.parametrize("name", TEXTS)
def test_golden(captured: Any, name: str, request: pytest.FixtureRequest) -> None:
    _, base = captured["decoder"]
    got = f"# {RECIPES[name]}\n{difference(base, peftfx.run(base, RECIPES[name]))}"
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(got)
    assert path.exists(), f"write `# {name}{{...}}` into {path}, then pytest --update-golden"
    assert path.read_text() == got


def test_no_golden_text_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.iterdir()} == set(TEXTS)
