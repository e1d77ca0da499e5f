"""Adapters of one base beside each other: how alike their changes are, place by place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .exporters.adapter_changes import NEEDS_BASE, Described, Factors, inner, pieces
from .rewriter.errors import BaseMismatchError, BaseNeededError, OptionError, nearest


@dataclass(frozen=True)
class Likeness:
    """Two changes of one tensor, or of several together.

    Attributes:
        product: the sum of the products of their elements.
        norms: of both.
        conflicts: how many elements have opposite signs.
        both: how many are not zero in both.
    """

    product: float
    norms: tuple[float, float]
    conflicts: int
    both: int

    @property
    def cosine(self) -> float:
        """Of the angle between them; not a number where one is zero."""
        scale = self.norms[0] * self.norms[1]
        return self.product / scale if scale else math.nan

    @property
    def conflict(self) -> float:
        """The share of elements with opposite signs, of those that both change."""
        return self.conflicts / self.both if self.both else math.nan

    def __add__(self, other: Likeness) -> Likeness:
        (a, b), (c, d) = self.norms, other.norms
        norms = math.hypot(a, c), math.hypot(b, d)
        return Likeness(
            self.product + other.product, norms, self.conflicts + other.conflicts,
            self.both + other.both,
        )  # fmt: skip


Pair = tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Several adapters.

    Attributes:
        norms: place -> norm of each adapter's change there, None where it has none.
        likeness: pair of adapters -> place -> how alike; places that both change.
        unknown: place -> why its change is not known.
    """

    norms: Mapping[str, Sequence[float | None]]
    likeness: Mapping[Pair, Mapping[str, Likeness]]
    unknown: Mapping[str, str]

    def total(self, pair: Pair) -> Likeness:
        """Over all places that both change."""
        return sum(self.likeness[pair].values(), start=Likeness(0.0, (0.0, 0.0), 0, 0))


def compare(adapters: Sequence[Described]) -> Comparison:
    """Compares the changes of adapters, as far as they are known without a model.

    Raises:
        BaseMismatchError: two have no place in common, or changes of other sizes.
        BaseNeededError: all changes of one depend on the base. OptionError: it changes no weight.
    """
    changes = [_changes(a) for a in adapters]
    places = dict.fromkeys(name for one in changes for name in one)
    likeness: dict[Pair, dict[str, Likeness]] = {}
    for one, two in itertools.combinations(range(len(adapters)), 2):
        _require_common(adapters[one], adapters[two])
        shared = [n for n in changes[one] if n in changes[two]]
        likeness[one, two] = {n: _likeness(changes[one][n], changes[two][n]) for n in shared}
    norms = {n: [_norm(c[n]) if n in c else None for c in changes] for n in places}
    unknown = {p.target: p.unknown for a in adapters for p in a.places if p.change is None}
    return Comparison(norms, likeness, unknown)


def _changes(adapter: Described) -> dict[str, Factors | Tensor]:
    """Place -> all that the adapter changes there, where all of it is known."""
    found: dict[str, list[Factors | Tensor | None]] = {}
    for place in adapter.places:
        found.setdefault(place.target, []).append(place.change)
    known = {n: [c for c in group if c is not None] for n, group in found.items()}
    return {n: _sum(group) for n, group in known.items() if group and len(group) == len(found[n])}


def _sum(changes: Sequence[Factors | Tensor]) -> Factors | Tensor:
    first, *rest = changes
    if not rest:
        return first
    return torch.stack([torch.cat([x for x, _ in pieces(c, first)]) for c in changes]).sum(0)


def _require_common(one: Described, two: Described) -> None:
    for adapter in (one, two):
        if all(p.change is None for p in adapter.places):
            why = next(p.unknown for p in adapter.places)
            kind = BaseNeededError if why == NEEDS_BASE else OptionError
            if why != NEEDS_BASE:
                why = (
                    f"that of {', '.join(adapter.methods)} is known of a captured model alone. "
                    "Fold the adapters, and compare what peftfx extract finds"
                )
            raise kind(f"{adapter.path}: there is no change to compare: {why}.")
    names = [p.target for p in one.places]
    others = {p.target for p in two.places}
    if not others & {*names}:
        raise BaseMismatchError(
            f"{one.path} and {two.path} have no place in common: {names[0]!r} is nearest to "
            f"{nearest(names[0], others, 1)!r}. Give adapters of one base; where a format names "
            "weights in its own way, give --base with the directory of the model."
        )


def _likeness(one: Factors | Tensor, two: Factors | Tensor) -> Likeness:
    conflicts = both = 0
    for x, y in pieces(one, two):
        signs = torch.sign(x) * torch.sign(y)
        conflicts += int((signs < 0).sum())
        both += int((signs != 0).sum())
    return Likeness(inner(one, two), (_norm(one), _norm(two)), conflicts, both)


def _norm(change: Factors | Tensor) -> float:
    return max(inner(change, change), 0.0) ** 0.5
