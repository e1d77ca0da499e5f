"""Which axis of a program's values is that of the samples, as far as it is shown, not guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch.fx import Node

from ...graph.aten import shape
from ...inputs.spec import InputSpec
from ...measure.independence import Values
from ...program.state import State


@dataclass(frozen=True)
class SampleAxis:
    """How to tell the axis of the samples.

    Attributes:
        names: the dynamic sizes that are numbers of samples.
        size: the number of samples where it is fixed, else None.
        reason: why neither is known; '' if one is.
        remedy: how to capture a dynamic number of samples, a sentence; '' where there is one.
    """

    names: frozenset[str] = frozenset()
    size: int | None = None
    reason: str = ""
    remedy: str = ""

    def of(self, program: State, states: Node) -> int | None:
        """The axis of hidden states whose size depends on the number of samples alone."""
        sizes = shape(states)
        if sizes is None or len(sizes) < 2:
            return None
        if self.size is not None:
            axes = [a for a, s in enumerate(sizes[:-1]) if type(s) is int and s == self.size]
            return axes[0] if len(axes) == 1 or (axes and self.size == 1) else None
        for axis, extent in enumerate(sizes[:-1]):
            names = re.findall(r"[A-Za-z_]\w*", str(extent))
            if names and all(program.symbols.get(n) in self.names for n in names):
                return axis
        return None


_KNOWN: WeakKeyDictionary[Any, SampleAxis] = WeakKeyDictionary()


def sample_axis(program: State) -> SampleAxis:
    """The axis of the samples of a program, tried once on what was captured."""
    base = program.base
    if base.module not in _KNOWN:
        fork = base.fork()
        values = Values(fork.module, base.spec, base.symbols, base.sample, list(base.sites))
        tried = _tried(values)
        if tried.reason:  # another time there may be values
            return tried
        _KNOWN[base.module] = tried
    return _KNOWN[base.module]


def _tried(values: Values) -> SampleAxis:
    sizes = values.spec.sizes
    called = values.spec.of_kind("batch")
    verdicts = {n: values.mixes(n) for n in called or sizes}
    apart = [n for n, mixes in verdicts.items() if mixes is False]
    if called and not apart:
        said = f"samples are to lie along {called[0]!r}, but"
        if not any(verdicts.values()):
            return SampleAxis(
                reason=f"{said} that cannot be tried",
                remedy="Load the weights first, or capture with an example of unlike samples.",
            )
        others = [n for n in sizes if n not in called and values.mixes(n) is False]
        known = f" (along {others[0]!r} it does not)" if others else ""
        return SampleAxis(
            reason=f"{said} what lies along it influences one another{known}",
            remedy=_capture(values.spec, others[0] if others else None),
        )
    if len(apart) > 1 and not called:
        return SampleAxis(
            reason=f"samples may lie along {' or '.join(apart)}: call the one 'batch'",
            remedy=f"If it is {apart[0]}: {_capture(values.spec, apart[0])}",
        )
    return SampleAxis(frozenset(apart)) if apart else _fixed(values)


def _capture(spec: InputSpec, label: str | None = None, axis: int | None = None) -> str:
    """How to capture so that a size, or an axis of the first input with two, is the batch."""
    for source in spec.inputs:
        sizes = dict(enumerate(source.shape))
        place = next((a for a, s in sizes.items() if s == label), axis)
        if len(sizes) < 2 or place is None or place not in sizes:
            continue
        dynamic = {a: s for a, s in sizes.items() if isinstance(s, str)}
        names = {a: s.replace("batch", "sequence", 1) for a, s in dynamic.items()}
        named = dict(sorted({**names, place: "batch"}.items()))
        others = ", and alike for the other inputs" if len(spec.inputs) > 1 else ""
        return f"Capture with dynamic={{{source.name!r}: {named}}}{others}."
    return "Capture with dynamic={input: {axis: 'batch'}} for the axis of the samples."


def _fixed(values: Values) -> SampleAxis:
    """Where the number of samples is no dynamic size: on axis 0 of the first input, or on 1."""
    unknown = SampleAxis(
        reason="it cannot be told along which axis of the inputs samples lie",
        remedy=_capture(values.spec),
    )
    first = next((i.shape for i in values.spec.inputs if len(i.shape) > 1), None)
    if first is None:
        return unknown
    mixes = [_mixes(values, axis, size) for axis, size in enumerate(first[:2])]
    match first[0], first[1], *mixes:
        case int(rows), _, False, _ if rows > 1:
            axis = 0
        case 1, _, _, True | None:
            axis = 0
        case _, int(rows), True, False if rows > 1:
            axis = 1
        case _, 1, True, _:
            axis = 1
        case _:
            return unknown
    return SampleAxis(size=int(first[axis]), remedy=_capture(values.spec, axis=axis))


def _mixes(values: Values, axis: int, size: int | str) -> bool | None:
    if isinstance(size, str):
        return values.mixes(size)
    return values.mixes_fixed(axis, size) if size > 1 else None
