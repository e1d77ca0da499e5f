"""Several adapters that one method inserted at the same places, as one of that method's own kind.

What the members' tensors become is the business of the pass (`merged`); the new adapter is inserted
by the members' own pass, so anything that method does with an adapter, it does with this one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import MetaTensorError, PassError, nearest
from ...rewriter.files.identity import merkle_root, tensor_digest
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import NAME, Pass
from ...rewriter.pipeline.syntax import parse
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.state import BRANCHES, State
from ...rewriter.run.replay import load_values
from ...rewriter.run.run import apply_plan
from ...rewriter.storage.composed import Source, adapters_of
from ...rewriter.verify.verify import is_meta

Values = Mapping[str, Tensor]
"""Name of a tensor below its adapter's -> its values."""

_OWN = ("name", "seed", "where")
"""Options in which members may differ, as long as they are at the same places."""


@dataclass(frozen=True, kw_only=True)
class Averaged(Pass, abstract=True):
    """Puts one adapter in the place of several that are alike.

    Attributes:
        names: the members; all adapters by default. With sources: what to call theirs, in order.
        name: of the new adapter.
    """

    contract: ClassVar[Contract] = Contract("trainable")

    names: tuple[str, ...] | None = None
    name: str = ""

    @property
    def adapter(self) -> str:
        return self.name or self.text

    def check(self) -> None:
        fits = not self.name or bool(NAME.fullmatch(self.name))
        self.require(fits, "name", "letters, digits, _ and -")
        names = self.names or ("",)
        self.require(len(set(names)) == len(names) > 0, "names", "different adapters")

    @abstractmethod
    def merged(self, program: State, members: Mapping[str, Source], data: Any) -> Plan:
        """The tensors of the new adapter, and what was decided beside `members` and `pass`.

        Args:
            program: whose base they stand on.
            members: by name; alike.
            data: what `run` was given.
        """

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        if is_meta(program):
            raise MetaTensorError(
                f"{self.text}: the program has no values. Give it some first: peftfx.load_weights."
            )
        members = self._adopted(program, sources) if sources else self._own(program)
        self._require_alike(members)
        found = self.merged(program, members, data)
        first = next(iter(members.values()))
        decisions = {
            "members": list(members), "removed": [] if sources else list(members),
            "digests": {n: m.digest for n, m in members.items()}, "pass": first.text,
            "sites": list(first.decisions.get("sites", ())), "decisions": dict(first.decisions),
        }  # fmt: skip
        return Plan({**decisions, **found.decisions}, found.tensors)

    def apply(self, edit: Editor, plan: Plan) -> None:
        gone = set(plan.decisions["removed"])
        for attachment in [a for a in edit.program.attachments if a.adapter in gone]:
            edit.remove(attachment.path)
        (item,) = parse(plan.decisions["pass"])
        item.apply(edit, Plan(plan.decisions["decisions"]))
        load_values(edit.program, _named(self.adapter, plan.tensors))

    def _adopted(self, program: State, sources: Sequence[Any]) -> dict[str, Source]:
        saved = adapters_of(program, sources)
        names = list(self.names or [s.name for s in saved])
        if len(names) != len(saved) or len(set(names)) < len(names):
            raise PassError(
                f"{self.text}: the sources hold {', '.join(s.name for s in saved)}, and the "
                f"members are called {', '.join(names)}. Say names=[...], one of its own for each."
            )
        return dict(zip(names, saved, strict=True))

    def _own(self, program: State) -> dict[str, Source]:
        """The adapters of a program, as they would be saved."""
        there = list(dict.fromkeys(a.adapter for a in program.attachments))
        for name in self.names or ():
            if name not in there:
                raise PassError(
                    f"{self.text}: there is no adapter {name!r} with branches. Adapters: "
                    f"{', '.join(there) or 'none'}; nearest: {nearest(name, there)}."
                )
        chosen = self.names or [n for n in program.adapters if n in there]
        if not chosen:
            raise PassError(
                f"{self.text}: the program has no adapter. Insert some first, or give saved ones: "
                f"run(program, '{self.text}', sources=[...])."
            )
        return {name: self._saved(program, name) for name in chosen}

    def _saved(self, program: State, name: str) -> Source:
        reason = _obstacle(program, name)
        if reason:
            raise PassError(
                f"{self.text}: the adapter {name!r} cannot be a member: {reason}. Leave it out "
                "(names=[...]), or save each adapter by itself and give them as sources."
            )
        record = next(r for r in program.history if r.adapter == name)
        prefix = f"{BRANCHES}.{name}."
        values = program.adapter_tensors(name).items()
        tensors = {n.removeprefix(prefix): t for n, t in values}
        digest = merkle_root({n: tensor_digest(t) for n, t in tensors.items()})
        return Source(name, str(record.applied), record.plan.decisions, tensors, digest)

    def _require_alike(self, members: Mapping[str, Source]) -> None:
        (first, one), *others = members.items()
        (item,) = parse(one.text)
        if not isinstance(item, Method):
            raise PassError(f"{self.text}: {first!r} is of {item.text}, which is no method.")
        if item.departures:
            raise PassError(
                f"{self.text}: adapters of {item} differ in training from what they are "
                "afterwards, or let samples or tokens count. Choose adapters of another method."
            )
        for name, other in others:
            if reason := _unlike(item, one, other):
                raise PassError(
                    f"{self.text}: the adapters {first!r} and {name!r} cannot be averaged: "
                    f"{reason}. Choose others with names=[...], or train them alike."
                )


def alone(program: State, member: Source) -> tuple[State, str]:
    """The base of a program with one member, in evaluation mode, and what it is called there."""
    (item,) = parse(member.text)
    one = apply_plan(program.base, item, Plan(member.decisions), check=False)
    load_values(one, _named(str(item.adapter), member.tensors))
    return one.eval(), str(item.adapter)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of tensors of one shape and dtype, computed in float64."""
    total = torch.stack([t.double() for t in tensors]).mean(0)
    return total.to(tensors[0].dtype)


def _named(adapter: str, tensors: Values) -> dict[str, Tensor]:
    return {f"{BRANCHES}.{adapter}.{n}": t for n, t in tensors.items()}


def _obstacle(program: State, name: str) -> str:
    """Why an adapter of a program is not what its own pass inserts; empty if it is."""
    if owned := program.owned.get(name):
        return f"it trains {len(owned)} tensors of the base (first: {owned[0]})"
    records = [r for r in program.history if r.adapter == name]
    if len(records) != 1 or not isinstance(records[0].applied, Method):
        return "no method inserted it"
    if records[0].plan.tensors:
        return f"{records[0].applied} began from tensors of its own"
    if name in {n for r in program.history for n in _settled(r.plan)}:
        return "it was baked"
    if any(path.startswith(f"{BRANCHES}.{name}.") for path in program.shared):
        return "its branches share modules, which cannot be taken out of the graph"
    for attachment in program.attached_by(name):
        if attachment.slot in ("tokens", "routed"):
            return f"at {attachment.site} it cannot be taken out of the graph"
        if (owner := program.combined(attachment.path)) is not None:
            return f"{owner.adapter} combines it with others"
    return ""


def _settled(plan: Plan) -> Iterator[str]:
    """The adapters that a plan of `bake` settles."""
    for path in plan.decisions.get("branches", ()):
        yield path.removeprefix(f"{BRANCHES}.").partition(".")[0]


def _unlike(item: Method, one: Source, other: Source) -> str:
    """Why two adapters cannot be averaged; empty if they can."""
    (its,) = parse(other.text)
    if type(its) is not type(item):
        return f"the one is of {item.text}, the other of {its.text}"
    for option in (f.name for f in fields(item) if f.name not in _OWN):
        values = getattr(item, option), getattr(its, option)
        if values[0] != values[1]:
            return f"{option}={values[0]!r} and {option}={values[1]!r}"
    places = [set(s.decisions.get("sites", ())) for s in (one, other)]
    if odd := sorted(places[0] ^ places[1]):
        return f"only one of them is at {odd[0]}"
    if one.tensors.keys() != other.tensors.keys():
        return f"only one of them has {min(one.tensors.keys() ^ other.tensors.keys())}"
    for name, tensor in one.tensors.items():
        theirs = other.tensors[name]
        if tensor.shape != theirs.shape:
            return f"{name} is {list(tensor.shape)} in the one, {list(theirs.shape)} in the other"
        if not tensor.is_floating_point() and not torch.equal(tensor, theirs):
            return f"{name} is not equal in both, and has no mean"
    return ""
