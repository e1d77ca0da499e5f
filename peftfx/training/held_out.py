"""Evaluation while `fit` trains: when, what was best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..rewriter.api import Program
from ..rewriter.errors import NonFiniteError, OptionError
from .loop import Loop

HeldOut = Iterable[Any] | Callable[[Program], float]
"""Batches for the mean of the loss, or a figure of the program's, of which less is better."""


@dataclass
class Evaluation:
    """The evaluations of a run.

    Attributes:
        given: what is evaluated, or None.
        every: steps between two; the last step is evaluated in any case.
        patience: how many in a row may be no better before training stops; None: any number.
        figures: (steps done, figure) of each.
        best: what training had changed when the figure was best, see `Loop.values`.
    """

    given: HeldOut | None
    every: int
    patience: int | None
    figures: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    best: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, count in (("every", self.every), ("patience", self.patience)):
            if count is not None and count < 1:
                raise OptionError(f"{name} is {count}, but must be at least 1.")
        if self.patience is not None and self.given is None:
            raise OptionError("patience needs something to evaluate. Give held_out=, too.")

    @property
    def best_step(self) -> int | None:
        """After how many steps the figure was best, the first time."""
        return min(self.figures, key=lambda f: (f[1], f[0]))[0] if self.figures else None

    def after(self, done: int, loop: Loop) -> float | None:
        """Evaluates after `done` steps if it is time.

        Raises:
            NonFiniteError: the figure is no number.
        """
        if self.given is None or (done % self.every and done != loop.settings.steps):
            return None
        if callable(self.given):
            with loop.at_rest():
                figure = float(self.given(loop.program))
        else:
            figure = loop.evaluated(self.given)
        if math.isnan(figure):
            raise NonFiniteError(
                f"the held-out figure after step {done} is {figure}. Look at the held-out batches, "
                "or try a smaller lr."
            )
        self.figures.append((done, figure))
        if self.best_step == done:
            self.best = loop.values()
        return figure

    def is_enough(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before."""
        if self.patience is None or not self.figures:
            return False
        since = [step for step, _ in self.figures if step > (self.best_step or 0)]
        return len(since) >= self.patience
