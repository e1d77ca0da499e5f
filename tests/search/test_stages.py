"""The staged search: finds a design that was planted, and goes on behind its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import peftfx
from peftfx.rewriter.errors import ArtifactError, OptionError, PassError
from peftfx.search import staged

from .common import small


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    return small()


WANTED = {"grouping": "spindle", "allocation": "increasing", "strategies": ("a", "b", "-", "ab")}


def likeness(program: peftfx.Program) -> float:
    """How much of a planted design a program has."""
    method = program.history[-1].applied
    words = zip(method.strategies, WANTED["strategies"], strict=True)
    alike = sum(1.0 if own == wanted else 0.1 * (own != "-") for own, wanted in words)
    return alike + sum(2.0 for n in ("grouping", "allocation") if getattr(method, n) == WANTED[n])


def test_stages_find_a_planted_design(base: peftfx.Program, tmp_path: Path) -> None:
    record = tmp_path / "scores.json"
    asked: list[str] = []

    def evaluate(program: peftfx.Program) -> float:
        asked.append(program.history[-1].text)
        if len(asked) == 9:
            raise InterruptedError
        return likeness(program)

    options = "bottleneck=2,rank=2"
    given = {"parts": ("a", "b"), "samples": 2, "options": options, "record": record}
    with pytest.raises(InterruptedError):
        staged(base, evaluate, **given)  # pyright: ignore[reportArgumentType]
    assert len(json.loads(record.read_text())) == 8
    found = staged(base, evaluate, **given)  # pyright: ignore[reportArgumentType]
    assert len({*asked}) == len(asked) - 1 == len(json.loads(record.read_text()))
    (method,) = peftfx.parse(found.recipe)
    assert (method.grouping, method.allocation) == ("spindle", "increasing")  # pyright: ignore
    assert method.strategies == WANTED["strategies"]  # pyright: ignore
    assert found.stages["grouping"].keys() == {
        "spindle", "uniform", "increasing", "decreasing", "bottleneck",
    }  # fmt: skip
    assert list(found.stages) == [
        "grouping",
        "allocation",
        "groups",
        "group 1",
        "group 2",
        "group 4",
    ]
    assert found.score == likeness(peftfx.run(base, found.recipe)) == 8.0


def test_nonsense(base: peftfx.Program, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"parts has nothing in it. Give"):
        staged(base, likeness, parts=())
    with pytest.raises(OptionError, match="samples=0"):
        staged(base, likeness, samples=0)
    with pytest.raises(PassError, match=r"gave nan for s4.*Give a number"):
        staged(base, lambda _: float("nan"), parts=("a",), samples=1)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ArtifactError, match="no record"):
        staged(base, likeness, record=tmp_path / "bad.json")
