"""Adapters that another adapter is made of: of the program, or of saved artifacts.

A pass plans with `plan_members` and applies with `take_members`. What comes from artifacts is put
below the pass's own adapter, with its values in the plan, so that replaying needs no artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..edits.edit import Editor
from ..errors import BaseMismatchError, PassError, nearest
from ..files.identity import merkle_root, tensor_digest
from ..pipeline.syntax import parse
from ..program.history import Plan
from ..program.state import BRANCHES, State
from ..program.unchanged import base_digests, require_unchanged
from ..run.replay import load_values
from .artifact import Artifact, base_difference, read


@dataclass(frozen=True)
class Source:
    """One saved adapter that only inserts branches.

    Attributes:
        name: the adapter's name in its artifact.
        text: the pass that inserts it, as pipeline text.
        decisions: what that pass decided.
        tensors: its branches' tensors, by their names below the adapter's.
        digest: hash over the tensors' names and bytes.
    """

    name: str
    text: str
    decisions: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    digest: str


def adapters_of(program: State, sources: Sequence[Any]) -> list[Source]:
    """The adapters of artifacts that were trained on the program's base.

    Args:
        program: only its base is read.
        sources: directories that `save` wrote.

    Raises:
        PassError: a source is no path, or an adapter does more than insert branches.
        ArtifactError: (BaseMismatchError) an artifact is damaged, or of another base.
    """
    if not sources:
        return []
    require_unchanged(program)
    have = base_digests(program)
    members: list[Source] = []
    for source in sources:
        if not isinstance(source, str | Path):
            raise PassError(f"a source is a directory, not {type(source).__name__}.")
        artifact = read(source)
        if artifact.base_root != merkle_root(have):
            raise BaseMismatchError(base_difference(have, artifact.base, str(source)))
        members += _inserting(artifact, str(source))
    return members


def _inserting(artifact: Artifact, where: str) -> list[Source]:
    members: list[Source] = []
    for item, plan, _ in artifact.steps:
        if item.adapter is None or plan.tensors:
            raise PassError(
                f"{where}: its step {item} does more than insert branches. Load it into the "
                "program instead (peftfx.load), and give no sources."
            )
        prefix = f"{BRANCHES}.{item.adapter}."
        tensors = {
            n.removeprefix(prefix): t for n, t in artifact.tensors.items() if n.startswith(prefix)
        }
        digest = merkle_root({n: tensor_digest(t) for n, t in tensors.items()})
        members.append(Source(item.adapter, str(item), plan.decisions, tensors, digest))
    if trained := [n for n in artifact.tensors if not n.startswith(f"{BRANCHES}.")]:
        raise PassError(
            f"{where}: the adapter also trained {len(trained)} tensors of the base (first: "
            f"{trained[0]}), which other adapters do not share: insert it with norms=false."
        )
    return members


def plan_members(
    program: State, names: Sequence[str] | None, sources: Sequence[Any], slot: str
) -> Plan:
    """Chooses at least two adapters that have branches of one slot at the same sites.

    Args:
        program: holds the adapters, unless there are sources; then only its base matters.
        names: which ones, or what to call those of the sources, in order; all by default, and
            their own names.
        sources: see `adapters_of`.
        slot: of the branches.

    Returns:
        A plan with the decisions `members`, `sites` and, of sources, `adopted`, and their tensors.

    Raises:
        PassError: there are fewer, a name is unknown or given twice, or places differ.
    """
    members = adapters_of(program, sources)
    there = {a: [b.site for b in program.attachments if (b.adapter, b.slot) == (a, slot)]
             for a in program.adapters}  # fmt: skip
    chosen = list(names or [s.name for s in members] or [a for a, sites in there.items() if sites])
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or len(members) not in (0, len(chosen)):
        said = f"the sources hold {', '.join(s.name for s in members)}" if members else (
            f"the program has {', '.join(there) or 'none'}")  # fmt: skip
        raise PassError(
            f"two adapters or more are needed, each under a name of its own, not "
            f"[{', '.join(chosen)}]; {said}. Say names=[a,b], one for each."
        )
    if members:
        there = {
            n: list(s.decisions.get("sites", ())) for n, s in zip(chosen, members, strict=True)
        }
    for name in chosen:
        if not there.get(name):
            raise PassError(
                f"there is no adapter {name!r} with {slot} branches. Nearest: "
                f"{nearest(name, [a for a, sites in there.items() if sites])}."
            )
        odd = sorted(set(there[name]) ^ set(there[chosen[0]]))
        if odd:
            raise PassError(
                f"the adapters {chosen[0]!r} and {name!r} are not at the same places: only one "
                f"of them is at {odd[0]}. Insert both with the same where=."
            )
    adopted = {
        name: {"pass": s.text, "decisions": dict(s.decisions), "digest": s.digest}
        for name, s in zip(chosen, members, strict=False)
    }
    tensors = {
        f"{name}.{n}": t
        for name, s in zip(chosen, members, strict=False)
        for n, t in s.tensors.items()
    }
    decisions = {"members": chosen, "sites": there[chosen[0]], "adopted": adopted}
    return Plan(decisions, tensors)


def take_members(edit: Editor, plan: Plan) -> list[str]:
    """Inserts the members that come from sources; the names of all, as the editor takes them.

    Raises:
        PassError: a member of the program is not there (any more).
    """
    own, drawn = f"{edit.adapter}.", edit.generator.get_state()
    for name, step in plan.decisions["adopted"].items():
        (item,) = parse(step["pass"])
        with edit.below(name):
            item.apply(edit, Plan(step["decisions"]))
    values = {f"{BRANCHES}.{own}{name}": t for name, t in plan.tensors.items()}
    load_values(edit.program, values)
    edit.generator.set_state(drawn)  # what the pass draws does not depend on where members are
    for name in plan.decisions["members"]:
        if name not in plan.decisions["adopted"] and name not in edit.program.adapters:
            raise PassError(
                f"{edit.adapter!r} is made of the adapter {name!r}, which is not here. Keep "
                f"{name!r}, or remove {edit.adapter!r} first."
            )
    return [own + n if n in plan.decisions["adopted"] else n for n in plan.decisions["members"]]
