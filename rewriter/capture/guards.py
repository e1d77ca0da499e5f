"""What `torch.export` assumed about sizes: names, ranges, relations, and who needs them.

Export proves its graph for the sizes that satisfy its guards. A guard on one size becomes a range
or a fixed size, with the line that needs it; a guard between sizes becomes a relation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._sympy.printers import PythonPrinter

from ..aten import shape
from .relation import as_bound, names, violations

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


def read_sizes(
    inputs: Mapping[str, Node],
    exported: torch.export.ExportedProgram,
    asked: Mapping[str, Mapping[int, Any]],
    tensors: Mapping[str, Tensor],
) -> Sizes:
    """Reads the sizes of a captured graph.

    Args:
        inputs: the graph's placeholders by name.
        exported: what torch exported.
        asked: the axes that were to be dynamic.
        tensors: the user's example, whose equal batch sizes are one size.
    """
    sizes = Sizes()
    environment = _environment(inputs)
    batches: dict[int, str] = {}
    for name, node in inputs.items():
        dims: list[int | str] = []
        given: tuple[Any, ...] = shape(node) or ()
        for axis, size in enumerate(given):
            number = size if isinstance(size, int) else size.node.maybe_as_int()
            if number is not None:
                dims.append(number)
                if axis in asked[name]:
                    sizes.reasons[f"{name}.{axis}"] = _why_fixed(environment, name, axis)
                continue
            symbol = str(size)
            if symbol not in sizes.symbols:
                sizes.symbols[symbol] = _label(sizes, batches, tensors[name].shape[axis], axis)
            dims.append(sizes.symbols[symbol])
        sizes.shapes[name] = tuple(dims)
    for symbol, bound in exported.range_constraints.items():
        if str(symbol) in sizes.symbols:
            high = int(bound.upper) if bound.upper.is_finite and bound.upper < 2**31 else None
            low = int(bound.lower) if int(bound.lower) > 2 else 1
            locations = getattr(environment, "var_to_range_sloc", {}).get(symbol)
            place = _place(getattr(locations, "lower" if high is None else "upper", None))
            sizes.narrow(sizes.symbols[str(symbol)], (low, high), place)
    _read_relations(environment, sizes)
    return sizes


def _label(sizes: Sizes, batches: dict[int, str], size: int, axis: int) -> str:
    if axis == 0:
        return batches.setdefault(size, "batch" if not batches else f"batch_{len(batches) + 1}")
    count = len({v for v in sizes.symbols.values() if v.startswith("sequence")})
    return "sequence" if not count else f"sequence_{count + 1}"


def _environment(inputs: Mapping[str, Node]) -> Any:
    for node in inputs.values():
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def _read_relations(environment: Any, sizes: Sizes) -> None:
    seen: set[str] = set()
    named = {s: sympy.Symbol(l, integer=True, positive=True) for s, l in sizes.symbols.items()}
    for guard in getattr(environment, "guards", ()):
        expression: Any = environment.simplify(environment.replace(guard.expr))
        renamed: dict[Any, Any] = {
            s: named[str(s)] for s in expression.free_symbols if str(s) in named
        }
        if not renamed or len(renamed) != len(expression.free_symbols):
            continue  # proven already, or about values that are no input size
        text = PythonPrinter().doprint(expression.xreplace(renamed))
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
            sizes.relations.append(text)
            sizes.reasons[text] = place


def _why_fixed(environment: Any, name: str, axis: int) -> str:
    """The line that fixes a size, from the records of the shape environment."""
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
