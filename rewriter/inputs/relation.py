"""Relations between dynamic sizes, such as `sequence % 8 == 0`, as text that is safe to read back.

`torch.export` proves its graph for the sizes that satisfy its guards. Most guards are bounds of
one size; what is left is kept as text and evaluated by walking its syntax tree.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ..graph.symbols import shallow

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "trunc": math.trunc, "floor": math.floor,
    "ceil": math.ceil,
}  # fmt: skip
FUNCTIONS = frozenset({*_CALLS, "math"})
"""Words of a relation that are no sizes."""

_TEXT = 4096
_SPANS = {1: 130, 2: 14, 3: 6}
_LANDMARKS = (33, 64, 1000, 4096, 1 << 20)


def holds(relation: str, sizes: Mapping[str, int]) -> bool:
    """Whether a relation is true of the given sizes.

    Raises:
        ValueError: the text is not a relation.
        KeyError: it names a size that is not given.
    """
    try:
        return bool(_value(_parsed(relation), sizes))
    except ZeroDivisionError:
        return False
    except RecursionError as error:
        raise ValueError(f"the relation {relation[:60]!r}... is nested too deeply.") from error


@functools.lru_cache(maxsize=64)
def _parsed(relation: str) -> ast.expr:
    if len(relation) > _TEXT:
        raise ValueError(f"a relation is longer than {_TEXT} characters.")
    try:
        return shallow(ast.parse(relation, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{relation!r} is not a relation between sizes.") from error


def _value(node: ast.AST, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() as number):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _value(inner, sizes)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(p, sizes) for p in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(_value(p, sizes) for p in parts)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="math"), attr=name),
            args=parts,
            keywords=[],
        ) if name in _CALLS:
            return _CALLS[name](*(_value(p, sizes) for p in parts))
        case _:
            raise ValueError(f"{ast.dump(node)} is not part of a relation between sizes.")


def names(relation: str) -> tuple[str, ...]:
    """The sizes that a relation speaks of, sorted."""
    identifiers = {n.id for n in ast.walk(_parsed(relation)) if isinstance(n, ast.Name)}
    return tuple(sorted(identifiers - FUNCTIONS))


def violations(
    relation: str, ranges: Mapping[str, tuple[int, int | None]] = MappingProxyType({})
) -> Iterator[dict[str, int]]:
    """Sizes within `ranges` that break a relation, small ones first.

    Tried are all combinations of small sizes and of a few landmarks.
    """
    involved = names(relation)
    span = range(1, _SPANS.get(len(involved), 5))
    choices = [*span, *(n for n in _LANDMARKS if n not in span)]
    bounds = [ranges.get(name, (1, None)) for name in involved]
    grid = itertools.product(
        *([n for n in choices if n >= low and (high is None or n <= high)] for low, high in bounds)
    )
    for combination in sorted(grid, key=sum):
        sizes = dict(zip(involved, combination, strict=True))
        if not holds(relation, sizes):
            yield sizes


def as_bound(relation: str) -> tuple[int, int | None] | None:
    """The range of its one size that a relation amounts to, or None if it is not a range."""
    involved = names(relation)
    if len(involved) != 1:
        return None
    tried = [*range(1, _SPANS[1]), *(n for n in _LANDMARKS if n >= _SPANS[1])]
    kept = [n for n in tried if holds(relation, {involved[0]: n})]
    if not kept or any(kept[0] < n < kept[-1] and n not in kept for n in tried):
        return None
    broken = next((n for n in tried if n > kept[-1]), None)
    if broken is None:
        return kept[0], None
    high = kept[-1]
    while broken - high > 1:
        middle = (high + broken) // 2
        high, broken = (
            (middle, broken) if holds(relation, {involved[0]: middle}) else (high, middle)
        )
    return kept[0], high
