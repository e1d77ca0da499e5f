"""What folding reports."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        rounded: the largest rounding error of an expression's value, relative to its change.
        shares: by site, what rounding has left of what was learnt there.
        vanished: (site, why) where rounding lost nearly all of it.
        lossy: whether weights in formats that hold no other matrix are packed again.
        least: the share of a change that has to survive rounding, else its branches stay.
        rank: above 0, the largest part of each change, of this rank, is not folded.
        parts: by site, that part as factors `(b, a)`, see `rest.parted`.
        spared: paths of branches that stay because of `least`.
        packed: by site, what is left there of those.
        constants: by path, what branches read that is constant (see `measure/constants.py`).
    """

    folded: list[str] = field(default_factory=list[str])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    rounded: float = 0.0
    shares: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    vanished: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    lossy: bool = False
    least: float = 0.0
    rank: int = 0
    parts: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[Tensor, Tensor]]
    )
    spared: set[str] = field(default_factory=set[str])
    packed: dict[str, str] = field(default_factory=dict[str, str])
    constants: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    _readers: Readers | None = None

    @property
    def lost(self) -> float:
        """The largest rounding error of a weight, relative to its change."""
        return max(self.rounded, *(v.lost for v in self.shares.values()), 0.0)

    @property
    def gap(self) -> float:
        """The largest relative difference between a branch and what it folds."""
        return max((v.gap for v in self.shares.values()), default=0.0)

    @property
    def left(self) -> float:
        """The smallest share of a change that packing a weight again has left."""
        return min((self.shares[site].left for site in self.packed), default=1.0)

    def measured(self, site: str, verdict: Verdict, storage: str) -> None:
        """Notes what rounding to its storage dtype has left of a weight's change."""
        gap = max(verdict.gap, self.shares[site].gap if site in self.shares else 0.0)
        self.shares[site] = replace(verdict, gap=gap)
        self.vanished = [(s, note) for s, note in self.vanished if s != site]
        if verdict.vanished:
            self.vanished.append((site, verdict.said(storage)))

    def packed_again(self, site: str, verdict: Verdict, said: str) -> None:
        """Notes what packing a weight again has left."""
        self.measured(site, verdict, said)
        self.packed[site] = verdict.said(said)

    def spare(self, paths: Iterable[str], verdict: Verdict, storage: str) -> None:
        """Leaves branches where too little of their change would survive."""
        reason = (
            f"rounding to {storage} would leave {verdict.survives:.0%} of the change, less than "
            f"least={self.least:g}"
        )
        self.kept |= dict.fromkeys(paths, reason)
        self.spared |= {*paths}

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
            f"fold: {site}: {note}{more}. Use mode=residual or mode=keep, train longer, or "
            "capture the model in float32 before folding.",
            stacklevel=3,
        )
