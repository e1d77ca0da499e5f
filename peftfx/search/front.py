"""What a search found: trials, those that no other beats in everything, and how good those are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..rewriter.errors import OptionError

Values = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One configuration that was evaluated.

    Attributes:
        number: of the trial in its study.
        recipe: the configuration as pipeline text.
        scores: what `evaluate` gave; larger is better.
        parameters: how many the configuration trains; fewer are better.
    """

    number: int
    recipe: str
    scores: Values
    parameters: int

    @property
    def values(self) -> Values:
        """All objectives, to be made large."""
        return (*self.scores, -float(self.parameters))


@dataclass(frozen=True)
class Found:
    """What a search has found by now, by all workers.

    Attributes:
        trials: all that were evaluated, in the order of their numbers.
        stopped: why it ended: `trials`, `patience`, `timeout`, or `exhausted` (no configuration is
            left that it would not repeat).
        scores: names of the scores.
    """

    trials: tuple[Trial, ...]
    stopped: str
    scores: tuple[str, ...] = ("score",)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials that no other beats in everything, by rising numbers of parameters."""
        return front_of(self.trials)

    def best(self, parameters: int | None = None) -> Trial:
        """The trial of the highest first score, among those of at most so many parameters.

        Raises:
            OptionError: there is none.
        """
        fit = [t for t in self.front if parameters is None or t.parameters <= parameters]
        if not fit:
            least = min((t.parameters for t in self.trials), default=0)
            raise OptionError(
                f"no trial has at most {parameters} parameters; the smallest of "
                f"{len(self.trials)} has {least:,}. Choose more, or search on."
            )
        return max(fit, key=lambda t: (t.scores[0], -t.parameters))

    def draw(self, path: str | Path) -> None:
        """Writes the Pareto plot: parameters across, the first score up, the front as a line."""
        from .plot import draw_fronts

        draw_fronts(path, {"search": self.trials}, self.scores[0])


def front_of(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that no other beats in everything; of equal ones the first."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.parameters, [-s for s in t.scores], t.number)):
        if not any(_covers(other.values, trial.values) for other in kept):
            kept.append(trial)
    return tuple(kept)


def _covers(one: Values, other: Values) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))


def volume(points: Sequence[Values], reference: Values) -> float:
    """Hypervolume: of the region that some point beats and that beats the reference.

    Args:
        points: objectives, each to be made large.
        reference: what counts as nothing, in each objective.
    """
    inside = {p for p in points if all(a > b for a, b in zip(p, reference, strict=True))}
    if not inside:
        return 0.0
    if len(reference) == 1:
        return max(p[0] for p in inside) - reference[0]
    total, above = 0.0, sorted(inside, key=lambda p: -p[-1])
    for k, point in enumerate(above):  # slices of the last objective, from the best down
        below = above[k + 1][-1] if k + 1 < len(above) else reference[-1]
        if point[-1] > below:
            slab = volume([p[:-1] for p in above[: k + 1]], reference[:-1])
            total += slab * (point[-1] - below)
    return total
