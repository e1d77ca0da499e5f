"""The staged search of PEFT design spaces: one design choice after another, each by the mean score
of configurations drawn with it (Chen et al., ICLR 2023).

The stages: how layers are grouped, how parameters are allotted to groups, which groups are tuned,
and, group by group, which parts each has. Every stage keeps what earlier ones chose; what later
ones will choose is drawn, the same draws for every alternative.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rewriter.api import Program
from ..rewriter.errors import ArtifactError, OptionError, PassError, SelectorError
from ..rewriter.files.files import parse_json, read_file, write_file, write_json
from ..rewriter.run.run import run

GROUPS = 4
Design = Mapping[str, Any]
"""grouping, allocation, tuned (one truth value a group), words (the parts of each group)."""


@dataclass(frozen=True)
class Staged:
    """What the stages chose.

    Attributes:
        recipe: the design as pipeline text.
        score: of the configurations with it, their mean.
        stages: for each stage the mean score of every alternative, by its name.
    """

    recipe: str
    score: float
    stages: Mapping[str, Mapping[str, float]]


def staged(
    program: Program,
    evaluate: Callable[[Program], float],
    *,
    budget: float | None = None,
    options: str = "",
    parts: Sequence[str] = ("a", "l", "p", "b"),
    groupings: Sequence[str] = ("spindle", "uniform", "increasing", "decreasing", "bottleneck"),
    allocations: Sequence[str] = ("uniform", "increasing", "decreasing"),
    samples: int = 4,
    seed: int = 0,
    rest: str = "",
    record: str | Path | None = None,
    method: str = "s4",
) -> Staged:
    """Searches a design of groups of layers, greedily in four stages.

    Args:
        program: what designs are inserted into; never changed.
        evaluate: trains (a few epochs are what the paper has) and scores one; larger is better.
        budget: the share of the model's parameters of every design.
        options: further ones of the pass, such as `bottleneck=8,rank=2`.
        parts, groupings, allocations: the alternatives.
        samples: configurations that each alternative is judged by.
        seed: of what is drawn.
        rest: passes that every configuration ends with.
        record: a JSON file with every score; the same call goes on behind what is in it.
        method: the pass.

    Raises:
        OptionError: there is nothing to choose from, or the pass refuses an option.
        PassError: `evaluate` gave no finite number.
        ArtifactError: the record cannot be read or written, or is none.
    """
    for name, given in {"parts": parts, "groupings": groupings, "allocations": allocations}.items():
        if not given:
            raise OptionError(f"the search space is empty: {name} has nothing in it. Give some.")
    if samples < 1:
        raise OptionError(f"staged: samples={samples}, but it takes at least 1. Choose more.")
    sized = ",".join(filter(None, (options, "" if budget is None else f"budget={budget:g}")))
    scored = _Scored(program, evaluate, record, method, sized, rest)
    words = _subsets(parts)
    draws = [
        _drawn(random.Random(f"{seed} {k}"), words, groupings, allocations) for k in range(samples)
    ]
    stages: dict[str, dict[str, float]] = {}
    fixed: dict[str, Any] = {}

    def choose(stage: str, alternatives: Mapping[str, Design]) -> None:
        means = {n: scored.mean(draws, {**fixed, **a}) for n, a in alternatives.items()}
        means = {n: mean for n, mean in means.items() if mean is not None}
        if not means:
            raise OptionError(
                f"no design with {fixed} has a place in this model, whatever its {stage}. Give "
                "other parts=, or groupings=."
            )
        stages[stage] = means
        best = max(means, key=lambda n: means[n])
        fixed.update(alternatives[best])

    choose("grouping", {g: {"grouping": g} for g in groupings})
    choose("allocation", {a: {"allocation": a} for a in allocations})
    choose("groups", {_named(t): {"tuned": t} for t in _tunings()})
    for k in range(GROUPS):
        if fixed["tuned"][k]:
            choose(f"group {k + 1}", {w: {f"word{k}": w} for w in words})
    last = list(stages.values())[-1]
    return Staged(scored.text(draws[0], fixed), max(last.values()), stages)


def _subsets(parts: Sequence[str]) -> tuple[str, ...]:
    sizes = range(1, len(parts) + 1)
    return tuple("".join(c) for n in sizes for c in itertools.combinations(parts, n))


def _tunings() -> tuple[tuple[bool, ...], ...]:
    """All groups, all but one, and each alone."""
    one = [tuple(k == n for k in range(GROUPS)) for n in range(GROUPS)]
    return ((True,) * GROUPS, *(tuple(not k for k in row) for row in one), *one)


def _named(tuned: Iterable[bool]) -> str:
    return " ".join(str(k + 1) for k, on in enumerate(tuned) if on)


def _drawn(
    source: random.Random,
    words: Sequence[str],
    groupings: Sequence[str],
    allocations: Sequence[str],
) -> Design:
    """A random design, of which stages fix more and more."""
    design: dict[str, Any] = {
        "grouping": source.choice(groupings), "allocation": source.choice(allocations),
        "tuned": (True,) * GROUPS,
    }  # fmt: skip
    return design | {f"word{k}": source.choice(words) for k in range(GROUPS)}


class _Scored:
    """Scores of recipes, each evaluated once."""

    def __init__(
        self,
        program: Program,
        evaluate: Callable[[Program], float],
        record: str | Path | None,
        method: str,
        options: str,
        rest: str,
    ) -> None:
        self.program, self.evaluate, self.record = program, evaluate, record
        self.method, self.options, self.rest = method, options, rest
        self.known: dict[str, float] = {}
        if record is not None and Path(record).exists():
            self.known = _read(record)

    def text(self, draw: Design, fixed: Design) -> str:
        """A draw with what is fixed, as pipeline text."""
        design = {**draw, **fixed}
        words = [design[f"word{k}"] if design["tuned"][k] else "-" for k in range(GROUPS)]
        given = [f"strategies=[{','.join(words)}]", f"grouping={design['grouping']}"]
        given += [f"allocation={design['allocation']}", *filter(None, [self.options])]
        return ";".join(filter(None, (f"{self.method}{{{','.join(given)}}}", self.rest)))

    def mean(self, draws: Sequence[Design], fixed: Design) -> float | None:
        """Over the draws that have a place in the model; None if none has one (few layers leave
        groups empty)."""
        scores = [self.score(self.text(draw, fixed)) for draw in draws]
        there = [s for s in scores if s is not None]
        return statistics.fmean(there) if there else None

    def score(self, recipe: str) -> float | None:
        """Of one configuration, recorded as soon as it is known; None where it has no place."""
        if recipe in self.known:
            return self.known[recipe]
        try:
            candidate = run(self.program, recipe)
        except SelectorError:
            return None
        score = float(self.evaluate(candidate))
        if not math.isfinite(score):
            raise PassError(
                f"evaluate gave {score} for {recipe}, not a finite number. Scores before it are "
                "kept in the record. Give a number for every configuration."
            )
        self.known[recipe] = score
        if self.record is not None:
            write_file(self.record, write_json(self.known))
        return score


def _read(path: str | Path) -> dict[str, float]:
    found = parse_json(read_file(path), str(path))
    numbers = isinstance(found, dict) and all(isinstance(v, float | int) for v in found.values())
    if not numbers:
        raise ArtifactError(f"{path} is no record of scores by recipe. Give record= another name.")
    return {str(k): float(v) for k, v in found.items()}
