"""Contracts and certificates: what a pass promises about the outputs, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contract:
    """A promise.

    Attributes:
        kind: `identity` (outputs stay bit-equal at first, new parameters train), `exact`
            (bit-equal), `bounded` (equal up to rounding, see `bound`), `near` (within `limit` of
            the largest output), `trainable` (outputs change; what trains is declared).
        limit: for `near`.
    """

    kind: str
    limit: float = 0.0


@dataclass(frozen=True)
class Certificate:
    """A contract with its measured figures.

    Attributes:
        kind: the contract's kind, or `unmeasured` (no values on the meta device).
        measured: largest absolute difference, and the largest one relative to its own output.
        holds: whether the promise was kept.
    """

    kind: str
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    holds: bool = True

    @property
    def text(self) -> str:
        """One line for reports."""
        if not self.measured:
            return self.kind
        figures = ", ".join(f"{k} {v:.3g}" for k, v in self.measured.items())
        return f"{self.kind}: {figures}"

    def __str__(self) -> str:
        return self.text if self.holds else f"BROKEN {self.text}"
