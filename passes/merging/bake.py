"""Bake: put what training decided in the place of what it decided it with.

Ranks that a budget pruned go, nested ones are cut to the wanted number, gates become constants, a
generator becomes what it generates, a learnt mask becomes indices. Which of it a method does is
said in its own file; the replaced tensors are gone afterwards, the decisions stay in the history,
and what is left trains on. Where calibration data is given, the certificate says how far the
outputs moved on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError, nearest
from ...rewriter.graph.turns import alone
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.state import State
from ...rewriter.verify.verify import difference, is_meta


@dataclass(frozen=True, kw_only=True)
class Bake(Pass):
    """Settles adapters after training.

    Attributes:
        names: which adapters; all that have something to settle by default.
        inputs: inputs of the program that become constants, such as `{task=2}`.
        rank: how many ranks are left of adapters whose ranks are nested.
    """

    contract: ClassVar[Contract] = Contract("trainable")
    reshapes: ClassVar[bool] = True

    names: tuple[str, ...] | None = None
    inputs: dict[str, int] | None = None
    rank: int | None = None

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        data = None if data is None else list(data)
        wanted = program.adapters if self.names is None else self.names
        inputs = dict(self.inputs or {})
        if unknown := [n for n in inputs if n not in program.spec.names]:
            raise PassError(f"bake: the program has no input {unknown[0]!r} ({program.spec}).")
        if self.rank is not None and not any(_method(program, n).nested for n in wanted):
            raise PassError(
                f"bake: rank={self.rank} cuts adapters with nested ranks, and there is none. Leave "
                "it out."
            )
        asked = {} if self.rank is None else {"rank": self.rank}
        settled: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Tensor] = {}
        shown: list[str] = []
        for name in wanted:
            method = _method(program, name)
            inputs |= method.chosen(program, data, inputs)
            decisions = method.settle(program, data, {**inputs, **asked})
            if not decisions and self.names is not None:
                raise PassError(
                    f"bake: the adapter {name!r} ({method.text}) has nothing to settle."
                )
            shown += [n for n in method.shown if decisions and n in program.outputs_added]
            for path, decided in decisions.items():
                settled[path] = {}
                _sort(path, decided, settled[path], tensors)
        if not settled:
            raise PassError("bake: no adapter has anything to settle.")
        decisions = {"branches": settled, "inputs": inputs} | ({"outputs": shown} if shown else {})
        plan = Plan(decisions, tensors)
        if data is None or is_meta(program):
            return plan
        return replace(
            plan, decisions={**plan.decisions, "moved": self._moved(program, plan, data)}
        )

    def _moved(self, program: State, plan: Plan, data: Sequence[Any]) -> dict[str, float]:
        """How far outputs move on the calibration data."""
        with alone():
            trial = Editor(program.fork())
            self.apply(trial, plan)
            trial.finish()
        worst, relative = difference(program, trial.program, data)
        return {"data_abs": worst, "data_rel": relative}

    def apply(self, edit: Editor, plan: Plan) -> None:
        edit.figures.update(plan.decisions.get("moved", {}))
        for path, decided in plan.decisions["branches"].items():
            prefix = f"{path}/"
            tensors = {
                n.removeprefix(prefix): t for n, t in plan.tensors.items() if n.startswith(prefix)
            }
            edit.settle(path, {**decided, **tensors})
        for name in plan.decisions.get("outputs", ()):
            edit.drop_output(name)
        for name, fixed in plan.decisions["inputs"].items():
            if name not in (self.inputs or {}):
                edit.note(f"the data chose {name}={fixed}")
            edit.drop_input(name, f"it was fixed to {fixed}: {self}")


def _method(program: State, name: str) -> Method:
    for record in program.history:
        if record.adapter == name and isinstance(record.applied, Method):
            return record.applied
    raise PassError(
        f"there is no adapter {name!r}. Adapters: {', '.join(program.adapters) or 'none'}; "
        f"nearest: {nearest(name, program.adapters)}."
    )


def _sort(
    path: str, decided: Mapping[str, Any], json: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Puts one branch's decisions where a plan keeps them."""
    for key, item in decided.items():
        if isinstance(item, Tensor):
            tensors[f"{path}/{key}"] = item.detach().clone()
        else:
            json[key] = item
