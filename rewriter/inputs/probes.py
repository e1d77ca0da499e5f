"""Sizes to try a program at: within ranges, as relations demand, and far from each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from .relation import holds, names
from .spec import InputSpec

_BATCHES = ((2, 2), (3, 2), (1, 0))
_LENGTHS = ((12, -2), (7, 1), (1, 0))
"""Of each probe: the first size of its kind, and the step from one to the next."""

_SPAN = 130
_STEPS = 20_000


def probes(spec: InputSpec, sample: Mapping[str, int]) -> list[dict[str, int]]:
    """Up to three sets of all dynamic sizes: long, shorter (both without ones), and the smallest.

    Sizes that need not be equal differ where they can. Where no such set is known to be valid,
    that of the captured example is, which is `sample`.
    """
    cases: list[dict[str, int]] = []
    order = sorted(spec.sizes, key=lambda name: sample.get(name, 0))  # sums come behind their terms
    two = _without_ones(spec)
    for batches, lengths in zip(_BATCHES, _LENGTHS, strict=True):
        wanted = dict.fromkeys(order, 1)
        count, rows = {True: 0, False: 0}, spec.of_kind("batch")
        for name in spec.sizes:
            is_batch = name in rows
            first, step = batches if is_batch else lengths
            wanted[name] = _beyond(max(1, first + step * count[is_batch]), spec, name)
            count[is_batch] += 1
        sizes = fit(spec, wanted, two if lengths[0] > 1 else ())
        if sizes is not None and sizes not in cases:
            cases.append(sizes)
    return cases or [dict(sample)]


def smallest(spec: InputSpec) -> dict[str, int] | None:
    """The smallest sizes without ones, which may be a case of their own; None where none were
    found."""
    return fit(spec, dict.fromkeys(spec.sizes, 2), _without_ones(spec))


def _without_ones(spec: InputSpec) -> list[str]:
    return [f"{n} >= 2" for n in spec.sizes if spec.ranges.get(n, (1, None))[1] != 1]


def _beyond(size: int, spec: InputSpec, name: str) -> int:
    """`size` counted from the smallest one, where that is no small number."""
    low, _ = spec.ranges.get(name, (1, None))
    return size if size >= 2 * low or size == low else low - 1 + size


def fit(
    spec: InputSpec, wanted: Mapping[str, int], also: Sequence[str] = ()
) -> dict[str, int] | None:
    """Sizes near the wanted ones that the spec allows; None where none were found.

    Args:
        wanted: for every dynamic size; those that come first stay nearest.
        also: relations that must hold beside the spec's own.
    """
    order = tuple(wanted)
    due: dict[int, list[str]] = {}
    for relation in (*spec.relations, *also):
        places = [order.index(n) for n in names(relation) if n in order]
        if places:
            due.setdefault(max(places), []).append(relation)
    budget = iter(range(_STEPS))
    sizes: dict[str, int] = {}

    def place(index: int) -> bool:
        if index == len(order):
            return True
        for size in _near(spec, order[index], wanted[order[index]]):
            if next(budget, None) is None:
                return False
            sizes[order[index]] = size
            if all(holds(r, sizes) for r in due.get(index, ())) and place(index + 1):
                return True
        return False

    return {n: sizes[n] for n in spec.sizes} if place(0) else None


def _near(spec: InputSpec, name: str, wanted: int) -> Iterator[int]:
    low, high = spec.ranges.get(name, (1, None))
    top = max(low, wanted) + _SPAN if high is None else high
    start = min(max(wanted, low), top)
    yield start
    for distance in itertools.count(1):
        if distance > _SPAN or (start - distance < low and start + distance > top):
            return
        if start - distance >= low:
            yield start - distance
        if start + distance <= top:
            yield start + distance
