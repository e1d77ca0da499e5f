"""How good a search is: mean reciprocal rank, recall, and intervals by paired bootstrap.

Query i's right answer is function i; its reciprocal rank is 1 / (1 + number of functions that
score higher), with ties counted against it. Two encoders are compared on the same queries, so the
interval of the difference resamples queries, not encoders (Koehn 2004, W04-3250).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ranks = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def ranks(queries: Tensor, answers: Tensor) -> Ranks:
    """Rank of each query's right answer among all answers; 1 is best.

    Args:
        queries: `[n, hidden]`, row i asks for answer i.
        answers: `[n, hidden]`.

    Returns:
        `[n]` int64.
    """
    scores = (queries @ answers.T).numpy().astype(np.float64)
    right = np.diag(scores)[:, None]
    return (scores >= right).sum(1).astype(np.int64)


def reciprocal(places: Ranks) -> NDArray[np.float64]:
    """Reciprocal ranks."""
    return 1.0 / places


def mrr(places: Ranks) -> float:
    """Mean reciprocal rank."""
    return float(reciprocal(places).mean())


def recall(places: Ranks, k: int = 1) -> float:
    """Share of queries whose answer is among the first `k`."""
    return float((places <= k).mean())


def paired_bootstrap(
    ours: Sequence[float] | NDArray[np.float64],
    theirs: Sequence[float] | NDArray[np.float64],
    *,
    rounds: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `ours - theirs` over queries and its percentile interval.

    Args:
        ours: one score a query.
        theirs: the other system's score on the same queries.
        rounds: number of resamples.
        level: probability that the interval covers.
        seed: seeds the resampling.

    Raises:
        ValueError: the two do not have the same, non-zero number of queries.
    """
    left, right = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if left.shape != right.shape or left.size == 0:
        raise ValueError(
            f"a paired bootstrap needs one score of each system a query, not {left.size} and "
            f"{right.size} scores."
        )
    difference = left - right
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, difference.size, (rounds, difference.size))
    means = difference[picks].mean(1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(difference.mean()), float(low), float(high))
