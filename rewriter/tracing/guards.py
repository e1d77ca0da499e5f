"""What `torch.export` assumed about sizes: names, ranges, relations, and who needs them.

Export proves its graph for the sizes that satisfy its guards. A guard on one size becomes a range
or a fixed size, with the line that needs it; a guard between sizes becomes a relation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.printers import PythonPrinter

from ..errors import CaptureError
from ..graph.aten import shape
from ..inputs.relation import as_bound, names, violations

Bounds = tuple[int, int | None]


@dataclass
class Sizes:
    """The sizes of a captured graph's inputs.

    Attributes:
        symbols: torch's symbol -> our name (`batch`, `sequence`, ...).
        shapes: input -> its sizes, dynamic ones by name.
        ranges, relations, reasons: as in `InputSpec`.
    """

    symbols: dict[str, str] = field(default_factory=dict[str, str])
    shapes: dict[str, tuple[int | str, ...]] = field(default_factory=dict[str, Any])
    ranges: dict[str, Bounds] = field(default_factory=dict[str, Bounds])
    relations: list[str] = field(default_factory=list[str])
    reasons: dict[str, str] = field(default_factory=dict[str, str])

    def narrow(self, name: str, bounds: Bounds, reason: str = "") -> None:
        """Intersects the range of a size with `bounds`."""
        low, high = self.ranges.get(name, (1, None))
        limits = [h for h in (high, bounds[1]) if h is not None]
        narrowed = max(low, bounds[0]), min(limits, default=None)
        if reason and narrowed != (low, high):
            self.reasons[name] = reason
        self.ranges[name] = narrowed

    def relate(self, relation: str, reason: str) -> None:
        """Adds a relation."""
        self.relations.append(relation)
        self.reasons[relation] = reason


def read_sizes(
    inputs: Mapping[str, Node],
    exported: torch.export.ExportedProgram,
    asked: Mapping[str, Mapping[int, str]],
    equal: Sequence[tuple[str, str]] = (),
) -> Sizes:
    """Reads the sizes of a captured graph.

    Args:
        inputs: the graph's placeholders by name.
        exported: what torch exported.
        asked: the axes that were to be dynamic, with the user's name for each or ''.
        equal: symbols of which the model needs the second to be equal to the first, though the
            graph does not show it.

    Raises:
        CaptureError: the user gave one size two names.
    """
    sizes = Sizes()
    reading = _Reading(sizes, _environment(inputs), {later: first for first, later in equal})
    for name, node in inputs.items():
        wishes = asked[name]
        given: tuple[Any, ...] = shape(node) or ()
        sizes.shapes[name] = tuple(
            reading.size(name, axis, size, wishes.get(axis)) for axis, size in enumerate(given)
        )
    reading.narrow(exported)
    reading.relate()
    return sizes


class _Reading:
    """The sizes read so far, and what remains to be said of them once all are named."""

    def __init__(self, sizes: Sizes, environment: Any, firsts: Mapping[str, str]) -> None:
        self.sizes = sizes
        self.environment = environment
        self.firsts = firsts
        self.fixed: list[tuple[str, int, str]] = []
        self.labels: dict[str, Any] = {}

    def size(self, name: str, axis: int, size: Any, wish: str | None) -> int | str:
        """A number, or the name of a size that may change."""
        number = size if isinstance(size, int) else size.node.maybe_as_int()
        if number is None:
            return self._dynamic(name, axis, size, wish)
        if wish is not None:
            reason = self.sizes.reasons[f"{name}.{axis}"] = _why(self.environment, name, axis)
            self.fixed.append((wish, number, reason))
        return number

    def _dynamic(self, name: str, axis: int, size: Any, wish: str | None) -> str:
        sizes, symbol = self.sizes, str(size)
        label = sizes.symbols.get(symbol)
        if label is None:
            return self._first(name, axis, size, wish)
        if wish and wish != label:
            raise CaptureError(
                f"dynamic calls one size {label!r} and {wish!r} (input {name!r}, axis {axis}): "
                "the model needs the two to be equal. Give them one name."
            )
        return label

    def _first(self, name: str, axis: int, size: Any, wish: str | None) -> str:
        """The name of a size that no axis before had."""
        sizes, symbol = self.sizes, str(size)
        first = sizes.symbols.get(self.firsts.get(symbol, ""), "")
        label = sizes.symbols[symbol] = wish or first or _label(sizes, axis)
        if first and label != first:
            sizes.relate(f"{first} == {label}", "the model fails where they differ")
        expression: Any = size.node.expr
        if not expression.is_symbol:
            self.labels[label] = expression, _why(self.environment, name, axis)
        return label

    def narrow(self, exported: torch.export.ExportedProgram) -> None:
        """What is fixed, and the ranges of the rest."""
        sizes = self.sizes
        for label, number, reason in self.fixed:
            if label in sizes.symbols.values():
                sizes.narrow(label, (number, number), reason)
        origins = getattr(self.environment, "var_to_range_sloc", {})
        for symbol, bound in exported.range_constraints.items():
            if str(symbol) not in sizes.symbols:
                continue
            high = int(bound.upper) if bound.upper.is_finite and bound.upper < 2**31 else None
            low = int(bound.lower) if int(bound.lower) > 2 else 1
            place = _place(getattr(origins.get(symbol), "lower" if high is None else "upper", None))
            sizes.narrow(sizes.symbols[str(symbol)], (low, high), place)

    def relate(self) -> None:
        """Sizes that follow from others, and the guards between them."""
        sizes = self.sizes
        for label, (expression, reason) in self.labels.items():
            sizes.ranges.setdefault(label, (1, None))
            text = _named(expression, sizes)
            if text is not None:
                sizes.relate(f"{label} == {text}", reason)
        _read_relations(self.environment, sizes)


def _label(sizes: Sizes, axis: int) -> str:
    """A name that no size has yet: the first axis is taken to be that of the samples."""
    word = "batch" if axis == 0 else "sequence"
    count = len({v for v in sizes.symbols.values() if v.startswith(word)})
    return f"{word}_{count + 1}" if count else word


def _named(expression: Any, sizes: Sizes) -> str | None:
    """An expression of symbols in our names; None if one of them is no size of an input."""
    named = {s: sympy.Symbol(l, integer=True, positive=True) for s, l in sizes.symbols.items()}
    free = {s: named[str(s)] for s in expression.free_symbols if str(s) in named}
    if not free or len(free) != len(expression.free_symbols):
        return None
    return PythonPrinter().doprint(expression.xreplace(free))


def _environment(inputs: Mapping[str, Node]) -> Any:
    for node in inputs.values():
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def _read_relations(environment: Any, sizes: Sizes) -> None:
    seen = set(sizes.relations)
    for guard in getattr(environment, "guards", ()):
        text = _named(environment.simplify(environment.replace(guard.expr)), sizes)
        if text is None:
            continue  # proven already, or about values that are no input size
        if text in seen:
            continue
        seen.add(text)
        if not names(text) or next(violations(text, sizes.ranges), None) is None:
            continue
        bound = as_bound(text)
        place = _place(getattr(guard, "sloc", None))
        if bound is not None:
            sizes.narrow(names(text)[0], bound, place)
        else:
            sizes.relate(text, place)


def _why(environment: Any, name: str, axis: int) -> str:
    """The line that fixes or derives a size, from the records of the shape environment."""
    sources = getattr(environment, "source_to_var", {})
    symbol = sources.get(f"L['{name}'].size()[{axis}]")
    place = getattr(environment, "replacements_slocs", {}).get(symbol)
    return _place(place) or "the forward needs exactly this size"


def _place(location: Any) -> str:
    """`file.py:12 in function needs it` for a torch source location, '' for none of the model's."""
    match = re.search(r"([\w.-]+\.py):(\d+) in (\w+)", str(location or ""))
    if match is None or "non_strict_utils" in match[1]:
        return ""
    return f"{match[1]}:{match[2]}, in {match[3]}, needs it"
