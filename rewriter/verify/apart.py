"""Which branches may rest while another adapter is measured, so that it costs what the first did.

Branches that only change a value on its way (at a weight, behind a sublayer) and read nothing else
were measured when they were inserted, beside the captured model. Where both a program and what is
added to it are of that kind, the addition is measured once with all of them, bit for bit, and
beside the captured model while they rest.
"""

from __future__ import annotations

from ..program.fingerprint import Fingerprints, Print
from ..program.history import Attachment
from ..program.state import State

_ON_THE_WAY = frozenset(
    {
        "input_shift",
        "input_scale",
        "input_map",
        "row_scale",
        "delta",
        "output_scale",
        "output_shift",
        "serial",
    }
)


def resting(before: State, after: State) -> list[str]:
    """Paths of the branches of a program that may rest while what was added to it is measured; none
    where either does more than that."""
    there = {a.path for a in before.attachments}
    added = [a for a in after.attachments if a.path not in there]
    if before.base is before or not added or not (only_branches(before) and only_branches(after)):
        return []
    return [a.path for a in before.attachments]


def only_branches(program: State) -> bool:
    """Whether a program is the captured one with such branches and nothing else."""
    known, prints = program.tensors, program.prints or Fingerprints()
    other = known.trained or known.added or known.untied or known.removed
    other = other or program.shared or program.outputs_added
    other = other or any(not _equal(own, prints.base.get(n)) for n, own in prints.own.items())
    inserting = all(r.adapter and not r.applied.reshapes for r in program.history)
    same = inserting and not other and program.spec == program.base.spec
    return same and all(map(_on_the_way, program.attachments))


def _equal(own: Print, base: Print | None) -> bool:
    return base is not None and own.values is not None and own.values == base.values


def _on_the_way(attachment: Attachment) -> bool:
    return attachment.slot in _ON_THE_WAY and not attachment.reads and not attachment.members
