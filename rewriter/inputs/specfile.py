"""Input specs out of files: every part is what it should be, and no larger than inputs get."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .axes import KINDS, Kind
from .relation import names
from .spec import InputSpec
from .tensor_input import Absent, TensorInput

DTYPES = {str(d)[6:]: d for d in vars(torch).values() if isinstance(d, torch.dtype)}
"""Every dtype by its name, the only names that are looked up in torch."""

ELEMENTS = 2**30
"""Most elements that an example of an input has: `load` makes one to capture a model."""

_SIZE = 2**40
_KINDS = ("input", "constant", "list", "tuple", "dict")


def read_spec(data: Any) -> InputSpec:
    """Reads what `InputSpec.to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is malformed.
    """
    ranges = {_text(k): _range(v) for k, v in data["ranges"].items()}
    spec = InputSpec(
        inputs=tuple(_input(i, ranges) for i in data["inputs"]),
        ranges=ranges,
        parameters=tuple(_text(p) for p in data["parameters"]),
        constants=dict(data["constants"]),
        structure={_text(k): _template(v) for k, v in data["structure"].items()},
        variadic=_text(data["variadic"]),
        relations=tuple(_text(r) for r in data["relations"]),
        reasons={_text(k): _text(v) for k, v in data["reasons"].items()},
        kinds={_text(k): _kind(v) for k, v in data.get("kinds", {}).items()},
    )
    if len(set(spec.names)) != len(spec.names):
        raise ValueError(f"two inputs have one name: {', '.join(spec.names)}")
    for relation in spec.relations:
        if unknown := set(names(relation)) - set(spec.sizes):
            raise ValueError(f"the relation {relation} names {sorted(unknown)[0]!r}, no size")
    return spec


def _input(data: Mapping[str, Any], ranges: Mapping[str, tuple[int, int | None]]) -> TensorInput:
    name, dtype, fill = _text(data["name"]), DTYPES[_text(data["dtype"])], data["fill"]
    if not isinstance(fill, bool | int | float) or (type(fill) is int and abs(fill) > 2**64):
        raise TypeError(f"the value {fill!r} of the input {name!r} is no number")
    sizes = tuple(data["shape"])
    if not all(isinstance(s, str) or (type(s) is int and 0 <= s <= _SIZE) for s in sizes):
        raise ValueError(f"the shape {list(sizes)} of the input {name!r} is none")
    least = [s if isinstance(s, int) else ranges.get(s, (1, None))[0] for s in sizes]
    if len(sizes) > 64 or math.prod(least) > ELEMENTS:
        raise ValueError(f"the input {name!r} is {least} at least: larger than inputs get")
    optional, bounds = bool(data.get("optional", False)), data.get("values")
    values = None if bounds is None else _values(bounds)
    start = _start(data["start"], sizes) if "start" in data else None
    absent = _absent(data["absent"], len(sizes)) if "absent" in data else None
    needed = _text(data.get("needed", ""))
    return TensorInput(name, sizes, dtype, fill, optional, values, start, absent, needed)


def _absent(item: Any, axes: int) -> Absent:
    first, axis = item
    counts = axis is not None
    if type(first) not in (int, float, bool) or (type(first) is int and abs(first) > 2**62):
        raise TypeError(f"{first!r} is no number")
    if counts and not (type(axis) is int and 0 <= axis < axes and type(first) is int):
        raise ValueError(f"{item!r} does not say what an input is that is left out")
    return Absent(first, axis)


def _start(numbers: Any, sizes: tuple[int | str, ...]) -> tuple[float | int, ...]:
    count = math.prod(s for s in sizes if isinstance(s, int))
    if not all(type(n) in (int, float, bool) for n in numbers) or len(numbers) != count:
        raise ValueError(
            f"the input of the sizes {list(sizes)} does not begin with {count} numbers"
        )
    return tuple(numbers)


def _values(ends: Any) -> tuple[int, int]:
    low, high = ends
    if not all(type(n) is int and abs(n) < 2**63 for n in (low, high)) or high < low:
        raise ValueError(f"{ends!r} is not a range of values")
    return low, high


def _range(bounds: Any) -> tuple[int, int | None]:
    low, high = bounds
    ends = (low, low if high is None else high)
    if not all(type(n) is int and 0 <= n < 2**63 for n in ends) or ends[1] < low:
        raise ValueError(f"{bounds!r} is not a range of sizes")
    return low, high


def _kind(item: Any) -> Kind:
    if item not in KINDS:
        raise ValueError(f"{item!r} is no kind of axis")
    return item


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise TypeError(f"{item!r} is no text")
    return item


def _template(data: Any) -> Any:
    """A template of a container (see `nesting`), checked all the way down."""
    ((kind, body),) = data.items()
    if kind not in _KINDS:
        raise ValueError(f"{kind!r} is no part of a container")
    if kind == "input":
        return {kind: _text(body)}
    if kind == "constant":
        if not isinstance(body, bool | int | float | str | None):
            raise TypeError(f"{body!r} is no constant")
        return {kind: body}
    if kind == "dict":
        return {kind: {_text(k): _template(v) for k, v in body.items()}}
    return {kind: [_template(v) for v in body]}
