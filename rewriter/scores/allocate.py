"""Spending a budget: the parts of most worth, or for each place the form that is worth it.

Everything here is exact, and of equals the first is taken, so that all processes decide alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, OptionError


@dataclass(frozen=True)
class Form:
    """One way to spend at a place.

    Attributes:
        worth: what it is worth, in any unit; finite.
        cost: what it costs, in that of the budget; finite.
    """

    worth: float
    cost: float


def largest(scores: Iterable[tuple[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The `count` largest of all scores together, by one threshold.

    Holds the largest so far and the scores of one tensor, so scores may be made one by one.

    Args:
        scores: (name, scores), any shapes; names differ.
        count: at least 0; all where there are fewer scores.

    Returns:
        By name, flat int64 indices in ascending order. Of equal scores at the threshold, the
        first ones are taken, so that the number is exact.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    names: list[str] = []
    kept: tuple[Tensor, ...] | None = None  # scores, whose they are, and where
    for name, score in scores:
        flat = score.detach().flatten()
        if not bool(torch.isfinite(flat).all()):
            raise NonFiniteError(
                f"scores hold NaN or infinity ({name}): there are no largest ones."
            )
        places = torch.arange(flat.numel(), device=flat.device)
        more = flat, torch.full_like(places, len(names), dtype=torch.int32), places
        names.append(name)
        pool = more if kept is None else tuple(map(_joined, kept, more))
        chosen = _first(pool[0], count)
        kept = tuple(t[chosen] for t in pool)
    if kept is None:
        return {}
    _, owner, index = kept
    return {name: index[owner == place] for place, name in enumerate(names)}


def _joined(one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([one.to(other.device), other])


def _first(scores: Tensor, count: int) -> Tensor:
    """Which of a vector are the `count` largest, bool."""
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.topk(count, sorted=False).values.min()
    chosen = scores > cut
    level = (scores == cut).nonzero().flatten()
    chosen[level[: count - int(chosen.sum())]] = True
    return chosen


def most(
    scores: Sequence[Tensor], budget: float, costs: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Which parts are taken, in the order of their scores, until the budget is spent.

    Args:
        scores: vectors of any lengths.
        budget: how many parts; with costs, what all that are taken cost at most.
        costs: of each part, not negative.

    Returns:
        A bool vector for each.
    """
    order = torch.cat(list(scores)).argsort(descending=True, stable=True)
    count = max(0, int(budget))
    if costs is not None:
        spent = torch.cat(list(costs)).double()[order].cumsum(0)
        count = int((spent <= budget).sum())
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:count]] = True
    return list(kept.split([len(s) for s in scores]))


def best(forms: Mapping[str, Sequence[Form]], budget: float) -> dict[str, int]:
    """For each place the form that makes the sum of all worths largest, within a budget.

    Exact (multiple-choice knapsack): all sums that are not dominated, place by place, less those
    that cannot become the best, by the bound of the relaxed problem (Sinha & Zoltners 1979).

    Args:
        forms: place -> its forms, of which it gets one.
        budget: what all together may cost.

    Returns:
        Place -> which of its forms. Of sums of one worth, the cheapest.

    Raises:
        OptionError: not even the cheapest forms fit, or a number is not finite.
    """
    every = [(f.worth, f.cost) for options in forms.values() for f in options]
    if not all(np.isfinite(pair).all() for pair in every):
        raise OptionError("worths and costs must be finite. Leave the places out that have none.")
    least = sum(min(f.cost for f in options) for options in forms.values())
    if least > budget:
        raise OptionError(
            f"a budget of {budget:,.6g} is below the {least:,.6g} that the cheapest forms of "
            f"{len(forms)} places cost together. Give at least that much."
        )
    places = [_undominated(options) for options in forms.values()]
    bounds = _Bounds(places)
    costs, worths = np.zeros(1), np.zeros(1)
    trail: list[tuple[Any, Any]] = []
    for step, options in enumerate(places):
        count = len(costs)
        costs = np.concatenate([costs + f.cost for _, f in options])
        worths = np.concatenate([worths + f.worth for _, f in options])
        came, took = (
            np.tile(np.arange(count), len(options)),
            np.repeat([i for i, _ in options], count),
        )
        kept = bounds.may_win(step + 1, budget - costs, worths)
        kept = kept[np.lexsort((-worths[kept], costs[kept]))]
        rising = np.maximum.accumulate(np.concatenate([[-np.inf], worths[kept]]))
        kept = kept[worths[kept] > rising[:-1]]
        costs, worths = costs[kept], worths[kept]
        trail.append((came[kept], took[kept]))
    at = int(worths.argmax())
    taken: list[int] = []
    for came, took in reversed(trail):
        taken.append(int(took[at]))
        at = int(came[at])
    return dict(zip(forms, reversed(taken), strict=True))


def _undominated(options: Sequence[Form]) -> list[tuple[int, Form]]:
    """(index, form), of rising cost and worth."""
    kept: list[tuple[int, Form]] = []
    for index, form in sorted(enumerate(options), key=lambda i: (i[1].cost, -i[1].worth)):
        if not kept or form.worth > kept[-1][1].worth:
            kept.append((index, form))
    return kept


class _Bounds:
    """What the places from one on can add at most, and surely, for what is left of a budget."""

    def __init__(self, places: Sequence[Sequence[tuple[int, Form]]]) -> None:
        self.suffixes: list[tuple[float, float, Any, Any]] = []
        steps: list[tuple[float, float]] = []  # (cost, worth) from one form to a dearer one
        cost = worth = 0.0
        for options in (*reversed(places), ()):
            order = sorted(steps, key=lambda s: -s[1] / s[0])
            sums = np.cumsum([(0.0, 0.0), *order], axis=0)
            self.suffixes.insert(0, (cost, worth, sums[:, 0], sums[:, 1]))
            if options:
                steps += _hull([f for _, f in options])
                cost, worth = cost + options[0][1].cost, worth + options[0][1].worth

    def may_win(self, start: int, left: Any, worths: Any) -> Any:
        """Indices of the states that fit and may still become the best."""
        cost, worth, costs, gains = self.suffixes[start]
        slack = 1e-12 * max(1.0, float(np.abs(left).max()))
        left = left - cost + slack
        fits = (left >= 0).nonzero()[0]
        left, now = left[fits], worths[fits] + worth
        sure = now + gains[np.searchsorted(costs, left, "right") - 1]
        bound = now + np.interp(left, costs, gains)
        return fits[bound >= sure.max() - 1e-9 * max(1.0, abs(sure.max()))]


def _hull(options: Sequence[Form]) -> list[tuple[float, float]]:
    """The steps (cost, worth) along the upper hull of forms of rising cost, the best first."""
    corners = [options[0]]
    for form in options[1:]:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], form):
            corners.pop()
        corners.append(form)
    return [(b.cost - a.cost, b.worth - a.worth) for a, b in itertools.pairwise(corners)]


def _slope(a: Form, b: Form) -> float:
    return (b.worth - a.worth) / (b.cost - a.cost)
