"""What folding reports."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...program.readers import Readers
from ...program.state import State
from ...weights.verdict import Verdict


@dataclass
class Folding:
    """The result.

    Attributes:
        folded: paths of the branches that folded.
        kept: those that did not, and why.
        lost: the largest rounding error of a weight, relative to its change.
        gap: the largest relative difference between a branch and what it folds.
        vanished: (site, why) where rounding lost nearly all of what was learnt.
        lossy: whether weights in formats that hold no other matrix are packed again.
        packed: (site, what is left) of those, and `left` the smallest share of a change.
        constants: by path, what branches read that is constant (see `measure/constants.py`).
    """

    folded: list[str] = field(default_factory=list[str])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    lost: float = 0.0
    gap: float = 0.0
    vanished: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    lossy: bool = False
    packed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    left: float = 1.0
    constants: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    _readers: Readers | None = None

    def packed_again(self, site: str, verdict: Verdict, said: str) -> None:
        """Notes what packing a weight again has left."""
        self.packed.append((site, said))
        self.left = min(self.left, verdict.left)
        self.lost = max(self.lost, verdict.lost)
        if verdict.vanished:
            self.vanished.append((site, said))

    def of(self, program: State) -> Readers:
        """Who reads the tensors of the program that is folded."""
        if self._readers is None or self._readers.program is not program:
            self._readers = Readers(program)
        return self._readers


def warn_of(vanished: Sequence[tuple[str, str]]) -> None:
    """Warns where rounding lost nearly all of what was learnt."""
    if vanished:
        site, note = vanished[0]
        more = f" (and at {len(vanished) - 1} more sites)" if vanished[1:] else ""
        warnings.warn(
            f"fold: {site}: {note}{more}. Use more steps or a larger rate, keep the branch, or "
            "capture the model in float32 before folding.",
            stacklevel=3,
        )
