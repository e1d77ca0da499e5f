"""Along which axes of a program's inputs samples lie, as far as it is shown, not guessed; and from
there, by dataflow (`axes/named`), in every value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch.fx import Node

from ...axes.kinds import Kind
from ...axes.line import Line
from ...axes.named import NamedAxes, kinds_of_inputs, named_axes
from ...branches.samples import Order
from ...graph.aten import placeholders, shape
from ...inputs.spec import InputSpec
from ...inputs.tensor_input import TensorInput
from ...measure.independence import Values
from ...program.state import State


@dataclass(frozen=True)
class SampleAxis:
    """Where samples lie in the inputs.

    Attributes:
        names: the dynamic sizes that are numbers of samples.
        size: the number of samples where it is fixed, else None.
        axis: of the inputs that have so many places there, where it is fixed.
        reason: why neither is known; '' if one is.
        remedy: how to capture a dynamic number of samples, a sentence; '' where there is one.
    """

    names: frozenset[str] = frozenset()
    size: int | None = None
    axis: int = 0
    reason: str = ""
    remedy: str = ""


class ShownAxes:
    """What lies along the axes of a program's values, from where samples are shown to lie.

    Attributes:
        samples: what was shown of the inputs.
        named: the axes of all values.
    """

    def __init__(self, program: State) -> None:
        self.samples = sample_axis(program)
        self.named: NamedAxes = named_axes(program, _shown(program, self.samples))
        self._inputs = placeholders(program.module)
        self._lines: dict[tuple[Node, int], Line] = {}

    def line(self, value: Node, place: int) -> Line:
        """Where that lies which lies along an axis of a value."""
        if (value, place) not in self._lines:
            self._lines[value, place] = Line(self.named, value, place, self._inputs)
        return self._lines[value, place]

    def batch(self, states: Node) -> int | None:
        """The axis of a value along which samples alone lie, other than its last; None if it has
        none. One sample lies along whichever axis of size 1 comes first."""
        sizes = shape(states) or ()
        if self.samples.size == 1:
            return next((k for k, size in enumerate(sizes[:-1]) if size == 1), None)
        place = self.named.place(states, "batch")
        return None if place == len(sizes) - 1 else place

    def rows(self, states: Node) -> tuple[int, Order] | None:
        """The axis along which samples lie, and whether alone or beside what belongs to each."""
        place = self.batch(states)
        if place is not None:
            return place, "alone"
        return (0, "slow") if self.samples.size == 1 else self.named.within(states, "batch")


def _shown(program: State, samples: SampleAxis) -> dict[str, dict[int, Kind]]:
    """What lies along the axes of the inputs, where samples have been shown to lie."""
    called = kinds_of_inputs(program.spec)
    return {i.name: dict(_kinds(i, called[i.name], samples)) for i in program.spec.inputs}


def _kinds(
    item: TensorInput, called: Mapping[int, Kind], samples: SampleAxis
) -> Iterator[tuple[int, Kind]]:
    for axis, size in enumerate(item.shape):
        fixed = samples.size not in (None, 1) and axis == samples.axis and size == samples.size
        if fixed or size in samples.names:
            yield axis, "batch"
        elif called.get(axis) == "token":
            yield axis, "token"


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
    remedy = _capture(values.spec, axis=axis)
    return SampleAxis(size=int(first[axis]), axis=axis, remedy=remedy)


def _mixes(values: Values, axis: int, size: int | str) -> bool | None:
    if isinstance(size, str):
        return values.mixes(size)
    return values.mixes_fixed(axis, size) if size > 1 else None
