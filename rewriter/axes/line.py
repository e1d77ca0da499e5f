"""One axis of one value, and where what lies along it lies elsewhere.

Kinds do not tell two streams apart, sizes do not tell axes apart that happen to be equal. So the
tokens of one stream are followed from one of their axes; those of others, and whatever else is
known, are not they. Only where nothing is known of an axis does the symbol of its size say so, as
long as no other input has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch.fx import Node

from .named import NamedAxes
from .relation import Ref, extent, owner, sizes_of


class Line:
    """What lies along an axis, by token.

    Attributes:
        size: of the axis, a number or an expression of symbols.
    """

    def __init__(
        self, axes: NamedAxes, value: Node, place: int, inputs: Mapping[str, Node]
    ) -> None:
        self.size: Any = extent(sizes_of(value)[place])
        self._all, self._inputs, self._begin = axes, inputs, (owner(value), place)

    @cached_property
    def _own(self) -> NamedAxes:
        return self._all.only([self._begin])

    def alone(self, value: Node) -> tuple[int, ...]:
        """The axes of a value along which just these places lie, all of them."""
        return tuple(k for k in range(len(sizes_of(value))) if self._pure(value, k))

    def held(self, value: Node) -> tuple[int, ...]:
        """The axes of a value along which they lie, alone or with others."""
        return tuple(k for k in range(len(sizes_of(value))) if self._has(value, k))

    def mixed(self, value: Node) -> bool:
        """Whether an axis of a value holds some of them, or has them together with others."""
        return any(
            self._has(value, k) and not self._pure(value, k) for k in range(len(sizes_of(value)))
        )

    def unclear(self, value: Node) -> bool:
        """Whether an axis of a value is as long, and nothing tells what lies along it."""
        return any(self._has(value, k) is None for k in range(len(sizes_of(value))))

    def reaches(self, value: Node) -> bool | None:
        """Whether a value has an axis along which some of them lie; None if nothing tells."""
        verdicts = [self._has(value, k) for k in range(len(sizes_of(value)))]
        return True if True in verdicts else None if None in verdicts else False

    @cached_property
    def others(self) -> NamedAxes | None:
        """Where the axes of other inputs go that are as long, and no samples; None if none is."""
        begin: list[Ref] = []
        for source in self._inputs.values():
            words, own = self._all.words(source), self._own.of(source)
            begin += [
                (source, k)
                for k, size in enumerate(sizes_of(source))
                if extent(size) == self.size and own[k] is None and words[k] in ("token", "?")
            ]
        return self._all.only(begin) if begin else None

    def _pure(self, value: Node, place: int) -> bool:
        same = extent(sizes_of(value)[place]) == self.size
        return same and bool(self._has(value, place))

    def _has(self, value: Node, place: int) -> bool | None:
        """Whether they lie along an axis, alone or not; None if nothing tells."""
        size: Any = extent(sizes_of(value)[place])
        if str(size) == "1" or self._own.of(value)[place] is not None:
            return str(size) != "1"
        computed = _symbols(size) & _symbols(self.size)
        if not computed and size != self.size:
            return False
        if self.others is not None and self.others.of(value)[place] is not None:
            return False
        factors = self._all.of(value)[place]
        if factors is not None and not {f.kind for f in factors} & {"token", None}:
            return False
        return True if computed and self.others is None else None


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else size.free_symbols
