"""What `torch.export` assumed about sizes: names, ranges, relations, and who needs them.

Export proves its graph for the sizes that satisfy its guards. A guard on one size becomes a range
or a fixed size, with the line that needs it; a guard between sizes becomes a relation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

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
    environment = _environment(inputs)
    firsts = {later: first for first, later in equal}
    labels: dict[str, Any] = {}
    fixed: list[tuple[str, int, str]] = []
    for name, node in inputs.items():
        dims: list[int | str] = []
        given: tuple[Any, ...] = shape(node) or ()
        for axis, size in enumerate(given):
            wish = asked[name].get(axis)
            number = size if isinstance(size, int) else size.node.maybe_as_int()
            if number is not None:
                dims.append(number)
                if wish is not None:
                    reason = sizes.reasons[f"{name}.{axis}"] = _why(environment, name, axis)
                    fixed.append((wish, number, reason))
                continue
            symbol = str(size)
            known = sizes.symbols.get(symbol)
            if known is None:
                first = sizes.symbols.get(firsts.get(symbol, ""), "")
                known = sizes.symbols[symbol] = wish or first or _label(sizes, axis)
                if first and known != first:
                    sizes.relate(f"{first} == {known}", "the model fails where they differ")
                expression: Any = cast(Any, size).node.expr
                if not expression.is_symbol:
                    labels[known] = expression, _why(environment, name, axis)
            elif wish and wish != known:
                raise CaptureError(
                    f"dynamic calls one size {known!r} and {wish!r} (input {name!r}, axis {axis}): "
                    "the model needs the two to be equal. Give them one name."
                )
            dims.append(known)
        sizes.shapes[name] = tuple(dims)
    for label, number, reason in fixed:
        if label in sizes.symbols.values():
            sizes.narrow(label, (number, number), reason)
    for symbol, bound in exported.range_constraints.items():
        if str(symbol) in sizes.symbols:
            high = int(bound.upper) if bound.upper.is_finite and bound.upper < 2**31 else None
            low = int(bound.lower) if int(bound.lower) > 2 else 1
            locations = getattr(environment, "var_to_range_sloc", {}).get(symbol)
            place = _place(getattr(locations, "lower" if high is None else "upper", None))
            sizes.narrow(sizes.symbols[str(symbol)], (low, high), place)
    for label, (expression, reason) in labels.items():
        sizes.ranges.setdefault(label, (1, None))
        text = _named(expression, sizes)
        if text is not None:
            sizes.relate(f"{label} == {text}", reason)
    _read_relations(environment, sizes)
    return sizes


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
