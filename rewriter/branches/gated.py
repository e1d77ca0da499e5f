"""Branches behind a gate: another branch, times a value that the graph computes.

The gate is a read of the branch (`edit.add(site, GatedDelta(inner), gate=value)`), one number for
each sample or each token. Settled to a number, it is a constant factor, and what folds without it
folds again.
"""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar

from torch import Tensor

from ..parts.parts import Part
from .branch import Branch, Delta, Serial
from .prompts import KeyValue
from .samples import FIRST, Samples

Inner = TypeVar("Inner", bound=Branch)


class Gated(Branch, Generic[Inner]):
    """What gated branches share; `constant` is the gate where none is read."""

    def __init__(self, inner: Inner, *rest: Any) -> None:
        super().__init__(*rest)
        self.inner = inner
        self.constant = 1.0

    def settled(self, **decided: Any) -> Self:
        """With the number `gate` from now on."""
        twin = type(self)(self.inner)
        twin.constant = float(decided["gate"])
        return twin

    def part(self) -> Part | None:
        """The inner branch's; whoever writes it adds the gate that is read."""
        return self.inner.part() if self.constant == 1 else None

    def describe(self) -> str:
        inner = self.inner.describe()
        return inner if self.constant == 1 else f"gate={self.constant:g}, {inner}"


class GatedDelta(Gated[Delta], Delta):
    """`y = base(x) + g f(x)`."""

    def __init__(self, inner: Delta, rows: Samples | None = None) -> None:
        super().__init__(inner)
        self.dropout, self.samples = inner.dropout, rows or FIRST

    def branch(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """`gate`: `[batch, 1 or tokens, 1]` with its axes in any order, also where x has samples
        and tokens on one axis, as `rows` says."""
        y = self.inner.branch(x)
        if gate is None:
            return y * self.constant
        if gate.dim() > y.dim():
            gate = self.samples.joined(gate, y.shape[self.samples.axis])
        return y * gate

    def delta(self) -> Tensor:
        return self.inner.delta() * self.constant

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        inner = self.inner.factors()
        return inner and (inner[0], inner[1], inner[2] * self.constant)


class GatedKeyValue(Gated[KeyValue], KeyValue):
    """`K <- [g P_k; K]`, `V <- [g P_v; V]`."""

    def __init__(self, inner: KeyValue) -> None:
        super().__init__(inner, inner.length)

    def rows(self, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`gate`: one number a sample, `[batch, 1, 1]` with its axes in any order."""
        factor = self.constant if gate is None else gate.flatten()[:, None, None, None]
        key, value = self.inner.rows()
        return key * factor, value * factor


class QueryGatedKeyValue(KeyValue):
    """Rows that each query meets with a gate of its own: its scores with them are `g q P_k`, and
    what they give it is `g P_v`. The attention gates their columns, so the rows are as without."""

    by_query = True

    def __init__(self, inner: KeyValue) -> None:
        super().__init__(inner.length)
        self.inner = inner

    def rows(self, gates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`gates`: `[batch, tokens, 1]`."""
        del gates
        return self.inner.rows()

    def describe(self) -> str:
        return f"{self.inner.describe()}, gated by query"


class GatedSerial(Gated[Serial], Serial):
    """`h' = h + g f(z)` with z = h, or another value that f reads instead."""

    def update(self, h: Tensor, gate: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """`gate`: `[batch, 1 or tokens, 1]`; `seen`: z, of the shape of h."""
        factor = self.constant if gate is None else gate
        return self.inner.update(h if seen is None else seen) * factor
