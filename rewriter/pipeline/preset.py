"""Presets: methods that are several methods under one name, as one adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..edits.edit import Editor
from ..errors import PassError, SelectorError
from ..parts.parts import Part
from ..program.history import Plan
from ..program.sites import Site
from ..program.state import BRANCHES, State
from .controller import Controller, Forward, usual
from .method import Method
from .passes import Pass, Saved
from .syntax import parse

MEMBERS = "members"
"""The decision that holds each member's name, its text and what it decided, in order."""


class MemberControllers(Controller):
    """Drives the controllers of a preset's members, each of which sees its own branches alone."""

    def __init__(self, program: State, method: Pass) -> None:
        super().__init__(program, method)
        self.each: dict[str, Controller] = {}
        for name, member, decisions in _recorded(program, self.adapter):
            self.each[name] = own = member.controller(program, member)
            own.folder, own.sites = f"{name}.", frozenset(decisions["sites"])

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        prefix = f"{BRANCHES}.{self.adapter}."
        member = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        owner = self.each.get(member)
        return usual(parameter) if owner is None else owner.group(name, parameter)

    def start(self) -> None:
        for controller in self.each.values():
            controller.optimizer, controller.total_steps = self.optimizer, self.total_steps
            controller.start()

    def begin_forward(self, batch: Any) -> None:
        for controller in self.each.values():
            controller.begin_forward(batch)

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        terms = [c.loss(outputs, batch, forward) for c in self.each.values()]
        found = [t for t in terms if t is not None]
        return sum(found[1:], found[0]) if found else None

    def before_step(self, step: int) -> None:
        for controller in self.each.values():
            controller.before_step(step)

    def after_step(self, step: int) -> None:
        for controller in self.each.values():
            controller.after_step(step)

    def finish(self) -> tuple[Pass, ...]:
        return tuple(dict.fromkeys(p for c in self.each.values() for p in c.finish()))

    def state_dict(self) -> dict[str, Any]:
        return {name: c.state_dict() for name, c in self.each.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, controller in self.each.items():
            controller.load_state_dict(state[name])


@dataclass(frozen=True)
class Member:
    """A method that is part of a preset, and which sites of its placement it is put at."""

    method: Method
    takes: Callable[[Site], bool] = lambda _: True


@dataclass(frozen=True, kw_only=True)
class Preset(Method, abstract=True):
    """A method that is several methods under one name: one adapter, one artifact, one `without`.

    Each member's branches are below its name, `peftfx.<adapter>.<member>.<site>.<slot>`, and its
    text and decisions are in the plan. `kinds` and `where` are those of all members; a `where` of
    the user narrows the members' own places, and adds none.
    """

    controller: ClassVar[type[Controller]] = MemberControllers

    def members(self, program: State) -> Mapping[str, Member]:
        """The members by name, in the order of insertion; each has a placement of its own."""
        raise NotImplementedError

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        selection, absent = self._selection(program)
        wanted = {site.id for site in selection.taken}
        decided: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for name, member in self.members(program).items():
            plan = _planned(member.method, program, data, sources)
            if isinstance(plan, str):
                absent.append(name)
                skipped[name] = plan
                continue
            own = [i for i in plan.decisions["sites"] if i in wanted]
            own = [i for i in own if member.takes(program.sites[i])]
            kept = plan.decisions.get("skipped", {})
            kept = {i: why for i, why in kept.items() if i in wanted}
            about = {"name": name, "pass": str(member.method), "sites": own, "skipped": kept}
            decided.append({**plan.decisions, **about})
            tensors |= {f"{name}/{n}": t for n, t in plan.tensors.items()}
        sites = list(dict.fromkeys(i for each in decided for i in each["sites"]))
        if not sites:
            missing = "".join(f" {why}" for why in skipped.values())
            raise SelectorError(
                f"{self.text}: none of its members has a place in where={self.where!r}, which "
                f"narrows their own places and adds none.{missing} Say where= with other words, or "
                "choose another method."
            )
        return Plan({"sites": sites, MEMBERS: decided, "skipped": skipped}, tensors)

    def apply(self, edit: Editor, plan: Plan) -> None:
        for index, (name, member, decisions) in enumerate(_decided(plan, self.adapter)):
            with edit.below(name), edit.deciding(name, (MEMBERS, index)):
                member.apply(edit, Plan(decisions, edit.tensors))
        edit.skipped.extend(plan.decisions.get("skipped", {}).items())

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        settled: dict[str, Mapping[str, Any]] = {}
        for name, member, _ in _recorded(program, self.adapter):
            below = f"{BRANCHES}.{self.adapter}.{name}."
            decisions = member.settle(program, data, inputs)
            settled |= {p: said for p, said in decisions.items() if p.startswith(below)}
        return settled

    def saved_part(self, saved: Saved) -> Part | None:
        members = {name: member for name, member, _ in _decided(saved.plan, self.adapter)}
        owner = members.get(saved.member)
        return None if owner is None else owner.saved_part(saved)


def _planned(member: Method, program: State, data: Any, sources: Sequence[Any]) -> Plan | str:
    """What a member decides, or why the model has no place for it."""
    try:
        return member.plan(program, data, sources)
    except SelectorError as error:
        return str(error)


def _decided(plan: Plan, adapter: str) -> Iterator[tuple[str, Method, Mapping[str, Any]]]:
    """(name, method, decisions) of each member of a plan."""
    for decisions in plan.decisions[MEMBERS]:
        (member,) = parse(decisions["pass"])
        if not isinstance(member, Method):
            raise PassError(f"{member} inserts no adapter, so it is no member. Save it again.")
        yield decisions["name"], replace(member, name=adapter), decisions


def _recorded(program: State, adapter: str) -> Iterator[tuple[str, Method, Mapping[str, Any]]]:
    """The members of an adapter of a program."""
    record = next(r for r in program.history if r.adapter == adapter)
    return _decided(record.plan, adapter)
