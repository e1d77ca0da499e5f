"""Structured pruning: what some places of a program can lose is scored, and the least goes.

A pass says which places, and what they can lose (`Editor.channels`): everything that is coupled to
it goes along, adapters in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..edits.edit import Editor
from ..edits.linear.compose import adapted_weight
from ..edits.structure.axes import Channels, channels
from ..errors import MetaTensorError, PassError
from ..pipeline.passes import Pass
from ..program.history import Contract, Plan
from ..program.sites import LinearSite, Site
from ..program.state import State
from ..weights.weight import Weight, stored_weights, weights_at
from .allocate import most
from .gradients import gradients


@dataclass(frozen=True, kw_only=True)
class Pruning(Pass, abstract=True):
    """Base of passes that shrink a program.

    With V_c all that belongs to channel c of the adapted weights,

        magnitude   I_c = sum |v|^2,  divided by the place's mean   (v in V_c)
        taylor      I_c = sum |v dL/dv|                              (gradients summed over batches)

    The certificate says which share of all parameters, adapters included, was removed.

    Attributes:
        ratio: the share of channels that is removed.
        score: `magnitude`, or `taylor`, which needs `data` (see `rewriter/scores/gradients.py`).
        scope: rank the channels of each place (`local`) or of all places together (`global`).
        round_to: how many are left is a multiple of it (rounded up).
    """

    reshapes: ClassVar[bool] = True
    contract: ClassVar[Contract] = Contract("trainable")
    unit: ClassVar[str] = "channels"
    """What goes, in messages."""

    ratio: float = 0.25
    score: Literal["magnitude", "taylor"] = "magnitude"
    scope: Literal["local", "global"] = "local"
    round_to: int = 1

    def check(self) -> None:
        self.require(0 < self.ratio < 1, "ratio", "between 0 and 1")
        self.require(self.round_to >= 1, "round_to", "at least 1")

    def places(self, program: State) -> Iterable[Site]:
        """The sites that may lose something, see `Editor.channels`."""
        raise NotImplementedError

    def shown(self, program: State) -> State:
        """The program in which the parts that go are looked for."""
        return program

    def remove(self, edit: Editor, site_id: str, kept: Sequence[int]) -> str:
        """Cuts a place to the channels that are kept; why nothing went, or empty."""
        group = edit.channels(edit.program.sites[site_id])  # pyright: ignore[reportArgumentType]
        if len(kept) == group.count:
            return f"all of its {self.unit} are kept"
        edit.cut(group, kept)
        return ""

    def remedy(self, site: Site) -> str:
        """What else could be chosen for a place that cannot be cut."""
        del site
        return ""

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        groups: dict[str, Channels] = {}
        skipped: dict[str, str] = {}
        taken: dict[str, str] = {}
        shown = self.shown(program)
        for site in self.places(shown):
            try:
                group = channels(shown, site)  # pyright: ignore[reportArgumentType]
            except PassError as error:
                skipped[site.id] = str(error).removeprefix(f"{site.id}: ") + self.remedy(site)
                continue
            other = next((taken[n] for n in group.stored if n in taken), None)
            if other is not None:
                skipped[site.id] = f"it shares its weights with {other}"
                continue
            groups[site.id] = group
            taken |= dict.fromkeys(group.stored, site.id)
        if not groups:
            raise PassError(f"{self.text}: no block can be cut. {'; '.join(skipped.values())}")
        kept = self._choose(groups, self._scores(program, groups, data))
        return Plan({"kept": kept, "skipped": skipped})

    def apply(self, edit: Editor, plan: Plan) -> None:
        edit.skipped += list(plan.decisions["skipped"].items())
        before = _size(edit.program)
        for site_id, kept in plan.decisions["kept"].items():
            if reason := self.remove(edit, site_id, kept):
                edit.skipped.append((site_id, reason))
            else:
                edit.edited.append(site_id)
        edit.figures["removed"] = 1 - _size(edit.program) / before

    def _scores(
        self, program: State, groups: Mapping[str, Channels], data: Any
    ) -> dict[str, Tensor]:
        sites = (s for s in program.sites if isinstance(s, LinearSite) and not s.obstacle)
        linears = {s.weight: s for s in sites}
        members = {n: linears[n] for g in groups.values() for n in g.stored if n in linears}
        weights = weights_at(program, members.values())
        if any(w.device.type == "meta" for w in weights.values()):
            raise MetaTensorError(
                f"{self.text}: weights on the meta device have no values to score. Load them first."
            )
        taylor = self.score == "taylor"
        packed = [n for n, w in weights.items() if not w.is_dense] if taylor else []
        if packed:
            raise PassError(
                f"{self.text}: score=taylor asks for gradients of all entries, and {packed[0]} is "
                f"stored in {weights[packed[0]].format.said}. Use score=magnitude, or cut the "
                f"{self.unit} before."
            )
        slopes = gradients(program, data, members) if taylor else {}
        elements = {n: _elements(program, s, weights[n], slopes.get(n)) for n, s in members.items()}
        return {i: _score(g, elements, self.score == "magnitude") for i, g in groups.items()}

    def _choose(
        self, groups: Mapping[str, Channels], scores: Mapping[str, Tensor]
    ) -> dict[str, list[int]]:
        """The channels that each block keeps, in order."""
        counts = {i: len(s) * (1 - self.ratio) for i, s in scores.items()}
        if self.scope == "global":
            every = sum(len(s) for s in scores.values())
            kept = most(list(scores.values()), max(1, round(every * (1 - self.ratio))))
            counts = {i: int(k.sum()) for i, k in zip(scores, kept, strict=True)}
        chosen: dict[str, list[int]] = {}
        for site_id, score in scores.items():
            steps = -(-round(counts[site_id], 6) // self.round_to)
            width = min(len(score), max(1, int(steps)) * self.round_to)
            roots = groups[site_id].roots
            order = score.sort(descending=True, stable=True).indices[:width]
            chosen[site_id] = torch.isin(roots, roots[order]).nonzero().flatten().tolist()
        return chosen


def _size(program: State) -> int:
    """How many numbers there are, those of weights in few bits as entries of their matrices."""
    weights = stored_weights(program)
    parts = {n for w in weights.values() for n in w.names}
    own = sum(p.numel() for n, p in program.module.named_parameters() if n not in parts)
    return own + sum(w.format.rows * w.format.columns for w in weights.values())


def _elements(program: State, site: LinearSite, weight: Weight, slope: Tensor | None) -> Tensor:
    """The importance of each element of a weight, laid out like the weight."""
    matrix = adapted_weight(program, site, weight, scales=slope is None).double()
    matrix = matrix.T if site.in_out and weight.is_dense else matrix
    # dL/dW has the scales in it already: diag(o) V diag(i) * dL/d(that) = V * dL/dW.
    return matrix**2 if slope is None else (matrix * slope).abs()


def _score(group: Channels, elements: Mapping[str, Tensor], normalise: bool) -> Tensor:
    """The importance of each channel, summed over all weights that have a part in it."""
    total = torch.zeros(group.count + 1, dtype=torch.float64)
    for name, axes in group.stored.items():
        for axis, labels in axes.items():
            if name in elements:
                rows = elements[name].movedim(axis, 0).flatten(1).sum(1)
                total.index_add_(0, labels % (group.count + 1), rows.cpu())
    scores = total[:-1][group.roots]
    return scores / scores.mean() if normalise and float(scores.mean()) else scores
