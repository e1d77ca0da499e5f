"""Base tensors that adapters train, on both sides of a fold of another adapter into them.

A fold's plan holds such a tensor as it was before (`fold_before/<name>`) and the digest of what the
fold left. So a replay gives every step the value that it had then, and one without the fold goes
on with the value before: nothing is ever divided out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..edits.calls.attach import Attaching
from ..errors import PassError
from ..files.identity import tensor_digest
from ..graph.sharded import whole
from ..program.history import Plan, Record
from ..program.state import State

BEFORE = "fold_before/"
LEFT = "fold_left"


def trained_tensors(program: State) -> dict[str, Tensor]:
    """Base tensors that adapters train, by name, as they are now."""
    return {n: program.module.get_parameter(n) for n in sorted(program.tensors.trained)}


def keep_trained(edit: Attaching, before: Mapping[str, Tensor]) -> None:
    """Adds to the plan what an edit has put another tensor in the place of.

    Args:
        before: `trained_tensors` before the edit.
    """
    after = trained_tensors(edit.program)
    moved = [n for n, t in before.items() if after[n] is not t and not t.is_meta]
    edit.tensors |= {f"{BEFORE}{n}": whole(before[n]).detach() for n in moved}
    left: dict[str, str] = edit.decided.setdefault(LEFT, {})
    for name in moved:
        left.setdefault(name, tensor_digest(after[name]))


def values_then(tensors: Mapping[str, Tensor], later: Sequence[Plan]) -> dict[str, Tensor]:
    """An adapter's tensors as the steps found them of which `later` are the plans, in order."""
    then = dict(tensors)
    for plan in reversed(later):
        then |= {n: plan.tensors[f"{BEFORE}{n}"] for n in then if f"{BEFORE}{n}" in plan.tensors}
    return then


def undone(program: State, steps: Iterable[tuple[int, Plan]]) -> dict[str, int]:
    """Trained tensors that a replay computes otherwise from some step on: name -> its index.

    Args:
        steps: (index in the history, plan) of what is replayed.

    Raises:
        PassError: one was trained on behind a fold that is not replayed as it was, so there is no
            value that it would have without.
    """
    replayed = dict(steps)
    first: dict[str, int] = {}
    for index, record in enumerate(program.history):
        plan = replayed.get(index)
        if plan is None or _branches(plan) != _branches(record.plan):
            for name in record.plan.decisions.get(LEFT, {}):
                first.setdefault(name, index)
    for name, index in first.items():
        _require_left(program, name, program.history[index:])
    return first


def _branches(plan: Plan) -> list[str]:
    return list(plan.decisions.get("branches", ()))


def _require_left(program: State, name: str, records: Sequence[Record]) -> None:
    folds = [r for r in records if name in r.plan.decisions.get(LEFT, {})]
    next_ones = [r.plan.tensors[f"{BEFORE}{name}"] for r in folds[1:]]
    now = program.module.get_parameter(name)
    for record, tensor in zip(folds, (*next_ones, now), strict=True):
        if record.plan.decisions[LEFT][name] != tensor_digest(tensor):
            raise PassError(
                f"{name} was trained on after {record.text} had folded another adapter into it, so "
                "what it would be without that fold cannot be told. Take adapters out before such "
                "a fold, or keep the program from before it."
            )
