"""Fronts, hypervolumes and plots, against definitions by counting."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from peftfx.rewriter.errors import OptionError
from peftfx.search import Found, Trial, draw_fronts, front_of, volume


def trials(count: int, scores: int, seed: int) -> list[Trial]:
    source = random.Random(seed)
    return [
        Trial(
            n,
            f"r{n}",
            tuple(float(source.randrange(6)) for _ in range(scores)),
            source.randrange(6),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(("scores", "seed"), [*itertools.product((1, 2), range(6))])
def test_the_front_is_what_nothing_beats(scores: int, seed: int) -> None:
    every = trials(12, scores, seed)
    front = {t.values for t in front_of(every)}
    values = {t.values for t in every}
    want = {
        v for v in values
        if not any(o != v and all(a >= b for a, b in zip(o, v, strict=True)) for o in values)
    }  # fmt: skip
    assert front == want and len(front_of(every)) == len(want)


@pytest.mark.parametrize(("dimensions", "seed"), [*itertools.product((1, 2, 3), range(5))])
def test_volume_counts_unit_cells(dimensions: int, seed: int) -> None:
    source = random.Random(seed)
    points = [tuple(float(source.randrange(7)) for _ in range(dimensions)) for _ in range(6)]
    reference = (1.0,) * dimensions
    cells = itertools.product(range(1, 7), repeat=dimensions)
    want = sum(
        any(all(p > c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in cells
    )
    assert volume(points, reference) == want


def test_nothing_has_no_volume() -> None:
    assert volume([], (0.0, 0.0)) == 0 and volume([(1.0, 0.0)], (0.0, 0.0)) == 0


def test_the_best_within_a_size() -> None:
    found = Found(
        (Trial(0, "a", (0.5,), 10), Trial(1, "b", (0.7,), 30), Trial(2, "c", (0.6,), 30)), "trials"
    )
    assert [t.recipe for t in found.front] == ["a", "b"]
    assert found.best().recipe == "b" and found.best(29).recipe == "a"
    with pytest.raises(
        OptionError, match=r"at most 5 parameters; the smallest of 3 has 10.*Choose"
    ):
        found.best(5)


def test_plots_show_every_trial_and_each_front(tmp_path: Path) -> None:
    one, two = trials(20, 1, 1), trials(10, 1, 2)
    draw_fronts(tmp_path / "fronts.svg", {"one": one, "two": two}, "accuracy")
    text = (tmp_path / "fronts.svg").read_text()
    fronts = len(front_of(one)) + len(front_of(two))
    assert text.count("<circle") == 30 + fronts + 2
    assert "one: 20 trials" in text and "accuracy against trained parameters" in text
    draw_fronts(tmp_path / "fronts.png", {"one": one})
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    draw_fronts(tmp_path / "single.svg", {"one": one[:1]})
    for searches in ({}, {"one": []}):
        with pytest.raises(OptionError, match="Give it"):
            draw_fronts(tmp_path / "none.svg", searches)
