"""Pareto plots: parameters across (logarithmic), a score up, each front as a line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..drawing import check_drawing
from ..drawing.boxes import BODY, FAINT, INK, MUTED, PAPER, SMALL
from ..drawing.canvas import Canvas, Circle, Line, text_width
from ..rewriter.errors import OptionError
from ..rewriter.files.files import write_file
from .front import Trial, front_of

COLORS = ("#2166ac", "#b45309", "#3f7d4f", "#7b4fa3")
LEFT, TOP, WIDTH, HEIGHT = 78.0, 84.0, 520.0, 300.0
"""Of the area between the axes, in pixels."""


def draw_fronts(
    path: str | Path, searches: Mapping[str, Sequence[Trial]], score: str = "score"
) -> None:
    """Draws the trials of one or several searches, by name.

    Args:
        path: a file name that ends in `.svg` or `.png`.
        searches: at most four.
        score: what the first score is called.

    Raises:
        OptionError: another suffix, no trials, or too many searches.
        ExportError: a PNG is asked for without Pillow.
        ArtifactError: the file cannot be written.
    """
    vector = check_drawing(path) == ".svg"
    if not any(searches.values()) or len(searches) > len(COLORS):
        raise OptionError(
            f"a Pareto plot shows the trials of 1 to {len(COLORS)} searches. Give it "
            '{"name": trials} with at least one trial.'
        )
    canvas = picture(searches, score)
    title = f"{score} against trained parameters: {', '.join(searches)}"
    write_file(path, canvas.svg(title, PAPER) if vector else canvas.png(PAPER))


def picture(searches: Mapping[str, Sequence[Trial]], score: str) -> Canvas:
    """The whole drawing on one canvas."""
    every = [t for trials in searches.values() for t in trials]
    across = _range([math.log10(max(1, t.parameters)) for t in every])
    up = _range([t.scores[0] for t in every])
    canvas = _axes(across, up, score)

    def place(trial: Trial) -> tuple[float, float]:
        x = (math.log10(max(1, trial.parameters)) - across[0]) / (across[1] - across[0])
        y = (trial.scores[0] - up[0]) / (up[1] - up[0])
        return LEFT + WIDTH * x, TOP + HEIGHT * (1 - y)

    x = LEFT
    for (name, trials), color in zip(searches.items(), COLORS, strict=False):
        front = front_of(trials)
        for trial in trials:
            canvas.add(Circle(*place(trial), 3.0, PAPER, color, 1.0))
        if steps := _steps([place(t) for t in front]):
            canvas.add(Line(steps, color, 1.6))
        for trial in front:
            canvas.add(Circle(*place(trial), 4.0, color))
        canvas.add(Circle(x + 4, TOP - 18, 4.0, color))
        x = canvas.write(x + 14, TOP - 14, f"{name}: {len(trials)} trials", BODY, INK) + 24
    canvas.width = max(LEFT + WIDTH + 30, x)
    canvas.height = TOP + HEIGHT + 60
    return canvas


def _steps(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """A front as stairs: between two trials the cheaper one is the best."""
    path = list(points[:1])
    for (_, before), (x, y) in itertools.pairwise(points):
        path += [(x, before), (x, y)]
    return tuple(path) if len(points) > 1 else ()


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _axes(across: tuple[float, float], up: tuple[float, float], score: str) -> Canvas:
    canvas = Canvas()
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    canvas.write(LEFT, 40, f"{score} against trained parameters", 18, INK, True)
    canvas.add(Line(((LEFT, TOP), (LEFT, bottom), (right, bottom)), MUTED, 1.2))
    for k in range(5):
        y = bottom - HEIGHT * k / 4
        canvas.add(Line(((LEFT, y), (right, y)), FAINT, 0.6))
        label = f"{up[0] + (up[1] - up[0]) * k / 4:.3g}"
        canvas.write(LEFT - 8 - text_width(label, SMALL), y + 4, label, SMALL, MUTED)
        x = LEFT + WIDTH * k / 4
        label = f"{10 ** (across[0] + (across[1] - across[0]) * k / 4):,.0f}"
        canvas.write(x - text_width(label, SMALL) / 2, bottom + 18, label, SMALL, MUTED)
    canvas.write(LEFT + WIDTH / 2 - 60, bottom + 42, "trained parameters", BODY, MUTED)
    return canvas
