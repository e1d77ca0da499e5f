"""What a program remembers of the passes that ran on it: what they decided, promised and did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
        given: under which condition it was measured, where the captured model itself does not
            give equal outputs for equal inputs in evaluation mode; else empty.
        step: which pass of a history was measured again, such as `1 lora{rank=4}`; '' in the
            record of that pass.
    """

    kind: str
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    holds: bool = True
    given: str = ""
    step: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """One line for reports."""
        if not self.measured:
            return self.kind
        figures = ", ".join(f"{k} {v:.3g}" for k, v in self.measured.items())
        return f"{self.kind}: {figures}{f' ({self.given})' if self.given else ''}"

    def __str__(self) -> str:
        text = f"{self.step}: {self.text}" if self.step else self.text
        return text if self.holds else f"BROKEN {text}"


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
"""The owner, in `Tensors.owned`, of what the program itself trains."""


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


class Index:
    """The attachments of a program by site, and the places of all that passes inserted."""

    def __init__(self) -> None:
        self._attachments: tuple[Attachment, ...] = ()
        self._shared: tuple[str, ...] = ()
        self._sites: dict[str, list[Attachment]] = {}
        self._paths: dict[str, str] = {}
        self._combined: dict[str, Attachment] = {}
        self._inside: dict[str, bool] = {}
        self.folders: set[str] = set()
        """What the second parts of all paths are: names of adapters."""

    def of(self, attachments: tuple[Attachment, ...], shared: tuple[str, ...]) -> Index:
        """This index, of these attachments and shared modules: what is new is added to it."""
        if attachments is self._attachments and shared is self._shared:
            return self
        known, self._inside = len(self._attachments), {}
        if shared != self._shared or attachments[:known] != self._attachments:
            self._sites, self._paths, known = {}, dict.fromkeys(shared, ""), 0
            self._combined = {}
            self.folders = {path.split(".")[1] for path in shared}
        for attachment in attachments[known:]:
            self._sites.setdefault(attachment.site, []).append(attachment)
            self._paths[attachment.path] = attachment.site
            self._combined |= dict.fromkeys(attachment.members, attachment)
            self.folders.add(attachment.path.split(".")[1])
        self._attachments, self._shared = attachments, shared
        return self

    def at(self, site: str) -> list[Attachment]:
        """The attachments of a site, in order."""
        return list(self._sites.get(site, ()))

    def site(self, path: str) -> str:
        """The site of the branch at a path; empty if there is none."""
        return self._paths.get(path, "")

    def combined(self, path: str) -> Attachment | None:
        """The attachment that the branch at a path is a member of."""
        return self._combined.get(path)

    def holds(self, name: str) -> bool:
        """Whether a tensor or module is part of what passes inserted."""
        owner = name.rpartition(".")[0]
        known = self._inside.get(owner)
        if known is None:
            known = owner in self._paths or (bool(owner) and self.holds(owner))
            self._inside[owner] = known
        return known
