"""Which axis of a program's values is that of the samples, as far as it is shown, not guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch.fx import Node

from ...graph.aten import shape
from ...measure.independence import Values
from ...program.state import State


@dataclass(frozen=True)
class SampleAxis:
    """How to tell the axis of the samples.

    Attributes:
        names: the dynamic sizes that are numbers of samples.
        size: the number of samples where it is fixed, else None.
        reason: why neither is known; '' if one is.
    """

    names: frozenset[str] = frozenset()
    size: int | None = None
    reason: str = ""

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
    called = [n for n in sizes if n.startswith("batch")]
    verdicts = {n: values.mixes(n) for n in called or sizes}
    apart = [n for n, mixes in verdicts.items() if mixes is False]
    if called and not apart:
        mixed = any(verdicts.values())
        why = "what lies along it influences one another" if mixed else "that cannot be tried"
        return SampleAxis(reason=f"samples are to lie along {called[0]!r}, but {why}")
    if len(apart) > 1 and not called:
        return SampleAxis(
            reason=f"samples may lie along {' or '.join(apart)}: capture with "
            "dynamic={input: {axis: 'batch', ...}} to say along which"
        )
    return SampleAxis(frozenset(apart)) if apart else _fixed(values)


def _fixed(values: Values) -> SampleAxis:
    """Where the number of samples is no dynamic size: on axis 0 of the first input, or on 1."""
    unknown = SampleAxis(reason="it cannot be told along which axis of the inputs samples lie")
    first = next((i.shape for i in values.spec.inputs if len(i.shape) > 1), None)
    if first is None:
        return unknown
    mixes = [_mixes(values, axis, size) for axis, size in enumerate(first[:2])]
    match first[0], first[1], *mixes:
        case int(rows), _, False, _ if rows > 1:
            return SampleAxis(size=rows)
        case 1, _, _, True | None:
            return SampleAxis(size=1)
        case _, int(rows), True, False if rows > 1:
            return SampleAxis(size=rows)
        case _, 1, True, _:
            return SampleAxis(size=1)
        case _:
            return unknown


def _mixes(values: Values, axis: int, size: int | str) -> bool | None:
    if isinstance(size, str):
        return values.mixes(size)
    return values.mixes_fixed(axis, size) if size > 1 else None
