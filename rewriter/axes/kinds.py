"""What lies along an axis: a word, or a product of words where one axis holds several.

`("batch", "token")` is the axis of a view that puts samples and their tokens on one axis, in
row-major order, and `("head", "width")` that of a projection to heads, whose width is each head's.
What is not known is None, and stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["batch", "token", "width", "channel", "head", "group", "expert", "rank"]
"""Samples; what belongs to one sample (tokens, frames, pixels); features of the stream, or of one
head; inner features of a feed-forward block, or those of a convolution; heads; heads of keys and
values that several queries share; experts; the inner axis of a low-rank product."""

KINDS: tuple[Kind, ...] = get_args(Kind)

_PARTS: dict[Kind, frozenset[Kind]] = {
    "width": frozenset({"width", "head", "group"}),
    "channel": frozenset({"channel", "head", "group"}),
    "head": frozenset({"head", "group"}),
    "token": frozenset({"token"}),
}
"""What an axis may turn out to be a product of."""


@dataclass(frozen=True)
class Factor:
    """One factor of an axis: what lies along it (None: not known) and how many there are, a number
    or an expression of symbols."""

    kind: Kind | None
    size: Any


Axis = tuple[Factor, ...]
"""What lies along an axis, the slowest factor first."""


def axis(kind: Kind | None, size: Any) -> Axis:
    """The axis along which one kind lies."""
    return (Factor(kind, size),)


def product(factors: Iterable[Factor]) -> Any:
    """How many places factors have together."""
    total: Any = 1
    for factor in factors:
        total = total * factor.size
    return total


def known(factors: Axis) -> bool:
    """Whether anything is known of an axis."""
    return any(f.kind is not None for f in factors)


def word(factors: Axis | None) -> str:
    """`head*width`; `?` for what is not known. Neighbours of one kind are one word."""
    if factors is None:
        return "?"
    words = [f.kind or "?" for f in factors]
    return "*".join(w for k, w in enumerate(words) if k == 0 or w != words[k - 1])


def joined(one: Axis, other: Axis) -> Axis | None:
    """What two findings about an axis say together; None if they contradict each other."""
    factors: list[Factor] = []
    left, right = list(one), list(other)
    while left and right:
        a, b = left[0], right[0]
        if a.size == b.size:
            if a.kind and b.kind and a.kind != b.kind:
                return None
            factors.append(a if a.kind else b)
            left, right = left[1:], right[1:]
        elif (run := _leading(right, a.size)) is not None:
            finer = _finer(a, run)
            if finer is None:
                return None
            factors += finer
            left, right = left[1:], right[len(run) :]
        elif (run := _leading(left, b.size)) is not None:
            finer = _finer(b, run)
            if finer is None:
                return None
            factors += finer
            left, right = left[len(run) :], right[1:]
        else:
            return None
    return tuple(factors) if not left and not right else None


def _leading(factors: Sequence[Factor], size: Any) -> Sequence[Factor] | None:
    """The first factors whose sizes multiply to `size`, if some do."""
    for count in range(1, len(factors) + 1):
        if product(factors[:count]) == size:
            return factors[:count]
    return None


def _finer(whole: Factor, run: Sequence[Factor]) -> Sequence[Factor] | None:
    """A factor as the product that it has turned out to be."""
    if not known(tuple(run)):
        return [whole]
    if whole.kind is None:
        return run
    if any(f.kind and f.kind not in _PARTS.get(whole.kind, ()) for f in run):
        return None
    return [Factor(f.kind or whole.kind, f.size) for f in run]


def split(factors: Axis, sizes: Sequence[Any]) -> list[Axis | None]:
    """What lies along the parts that a view makes of an axis; None where that is not known."""
    parts: list[Axis | None] = [None] * len(sizes)
    for step in (1, -1):
        left = list(factors)[::step]
        for k in range(len(sizes))[::step]:
            run = _leading(left, sizes[k])
            if run is None:
                break
            parts[k] = tuple(run)[::step]
            left = left[len(run) :]
    return [p if p is not None and known(p) else None for p in parts]


def merged(parts: Sequence[Axis | None], sizes: Sequence[Any]) -> Axis:
    """What lies along the product of several axes."""
    pairs = zip(parts, sizes, strict=True)
    return tuple(f for part, size in pairs for f in (part or axis(None, size)))


def piece(factors: Axis, start: int | None, size: Any) -> Axis | None:
    """What lies along a piece of an axis: some of its slowest factor; None if it is none."""
    first, *rest = _one_kind(factors)
    inner = product(rest)
    if not rest:
        return axis(first.kind, size) if first.kind else None
    if not isinstance(inner, int) or not isinstance(size, int) or start is None:
        return None
    return None if size % inner or start % inner else (Factor(first.kind, size // inner), *rest)


def whole(parts: Sequence[Axis | None], size: Any) -> Axis | None:
    """What lies along pieces put one behind the other, if it is the same along all."""
    pieces = [_one_kind(p) for p in parts if p is not None]
    if len(pieces) < len(parts):
        return None
    (first, *rest), inner = pieces[0], product(pieces[0][1:])
    if not first.kind or any((p[0].kind, [*p[1:]]) != (first.kind, rest) for p in pieces):
        return None
    if not rest:
        return axis(first.kind, size)
    fits = isinstance(size, int) and isinstance(inner, int) and size % inner == 0
    return (Factor(first.kind, size // inner), *rest) if fits else None


def _one_kind(factors: Axis) -> Axis:
    """The axis as one factor where all of them are of one kind (pixels in rows and columns)."""
    kinds = {f.kind for f in factors}
    return factors if len(kinds) > 1 else axis(factors[0].kind, product(factors))
