"""What a program remembers of the passes that ran on it: branches attached, and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .contract import Certificate


@dataclass(frozen=True)
class Attachment:
    """One branch at one site: which adapter it belongs to and where its module is.

    `reads`: keyword of the branch's forward -> name of the graph node that it reads.
    `members`: paths of the branches that it combines.
    """

    adapter: str
    site: str
    slot: str
    path: str
    reads: Mapping[str, str] = field(default_factory=dict[str, str])
    members: tuple[str, ...] = ()


ITSELF = ""
"""The owner, in `State.owned`, of what the program itself trains."""


@dataclass(frozen=True)
class Plan:
    """What a pass decided: strict JSON, and tensors for what JSON cannot hold.

    Replaying a plan needs neither the data nor the sources that led to it.
    """

    decisions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Record:
    """One entry of a program's history.

    Attributes:
        text: the pass as pipeline text.
        adapter: the adapter it inserted, or None.
        edited: ids of the edited sites.
        skipped: (site id, reason) of sites that were selected but left alone.
        certificate: what was promised and what was measured.
        seconds: time of planning, forking, editing and checking, by name.
        applied: the pass itself, a `pipeline.passes.Pass`.
        plan: what it decided.
        notes: what else the pass did, such as freezing what required gradients.
    """

    text: str
    adapter: str | None
    edited: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    certificate: Certificate
    seconds: Mapping[str, float]
    applied: Any
    plan: Plan
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.text}: {len(self.edited)} sites edited; {self.certificate}"]
        lines += [f"  {note}" for note in self.notes]
        for reason in dict.fromkeys(reason for _, reason in self.skipped):
            sites = [site for site, why in self.skipped if why == reason]
            if len(sites) > 3:
                lines.append(f"  skipped {len(sites)} ({', '.join(sites[:3])}, ...): {reason}")
            else:
                lines += [f"  skipped {site}: {reason}" for site in sites]
        return "\n".join(lines)
