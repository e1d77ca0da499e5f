"""Rebuilding a program from its base: its steps again, with the values that it has now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..errors import PassError, nearest
from ..graph.aten import set_attribute
from ..graph.module import copy_modes, state_tensors
from ..graph.outside import outside_modes
from ..graph.sharded import placed_like, whole
from ..program.history import ITSELF, Plan, Record
from ..program.state import BRANCHES, AnyProgram, State
from ..program.trained import require_owned, train_only
from ..program.unchanged import require_unchanged
from .before_fold import LEFT, undone, values_then
from .run import apply_plan, complete


def replay_steps(
    program: AnyProgram,
    adapters: Sequence[str] | None = None,
    kept: bool = True,
    left_out: str = "",
) -> Iterator[tuple[Record, AnyProgram, AnyProgram]]:
    """Rebuilds a program from its base, step by step, with its current values.

    Args:
        program: what to rebuild.
        adapters: which ones; all by default.
        kept: every step is a program of its own.
        left_out: a pass that inserts no adapter, whose steps are not replayed.

    Yields (record, before, after); `after` of an inserting pass holds freshly initialised
    branches as far as its certificate goes, and the current values from the next step on.
    Without `kept`, one program is edited on and on, so `before` and `after` hold for their step.
    """
    names = program.adapters if adapters is None else tuple(adapters)
    current = _begin(program) if kept else _begin(program).fork()
    records = [(i, r) for i, r in enumerate(program.history) if not _is_of(r, left_out)]
    kept_plans = ((i, r, _kept(r, names)) for i, r in records)
    steps = [(i, r, plan) for i, r, plan in kept_plans if plan is not None]
    other = undone(program, [(i, plan) for i, _, plan in steps])
    for index, (place, record, plan) in enumerate(steps):
        before = current
        current = apply_plan(current, record.applied, plan, check=False, owned=not kept)
        said = replace(current.history[-1], certificate=record.certificate)
        current.history = (*current.history[:-1], said)
        yield record, before, current
        reshaped = any(r.applied.reshapes for _, r, _ in steps[index + 1 :])
        later = [r.plan for r in program.history[place + 1 :]]
        inserts = record.adapter is not None and not record.applied.reshapes
        for name in [record.adapter] if inserts else current.owners:  # the others have theirs
            values = values_then(program.adapter_tensors(str(name)), later)
            here = {n: t for n, t in values.items() if other.get(n, place + 1) > place}
            load_values(current, here, reshaped)
        if set(names) == set(program.adapters):  # statistics are those of all of them together
            load_values(current, program.updated(), reshaped)


def _begin(program: AnyProgram) -> AnyProgram:
    """The base with what the user trains himself, as it was before any pass."""
    mine = program.owned.get(ITSELF)
    if not mine:
        return program.base
    current = program.base.fork()
    train_only(current, mine)
    values = values_then(program.adapter_tensors(ITSELF), [r.plan for r in program.history])
    load_values(current, values, reshaped=True)
    return current


def _kept(record: Record, names: Sequence[str]) -> Plan | None:
    """A record's plan for the given adapters alone; None if it has nothing to do for them."""
    plan = record.plan
    if record.adapter is not None and record.adapter not in names:
        return None
    paths = plan.decisions.get("branches")
    if not paths:
        return plan
    kept = [p for p in paths if p.split(".")[1] in names]
    if not kept:
        return None
    of_them = {p: paths[p] for p in kept} if isinstance(paths, Mapping) else kept
    decisions = {**plan.decisions, "branches": of_them}
    if len(kept) < len(paths):
        decisions.pop(LEFT, None)
    return replace(plan, decisions=decisions)


def _is_of(record: Record, name: str) -> bool:
    """Whether a step is one of a pass that inserts no adapter."""
    return record.adapter is None and record.applied.text == name


@outside_modes
def replay(program: AnyProgram, adapters: Sequence[str], left_out: str = "") -> AnyProgram:
    """The program with only the given adapters, rebuilt from its base without random choices."""
    require_owned(program)
    require_unchanged(program)
    current = _begin(program).fork()
    for _, _, after in replay_steps(program, adapters, kept=False, left_out=left_out):
        current = after
    complete(current)
    copy_modes(program.module, current.module)
    return current


def only(program: AnyProgram, names: Sequence[str]) -> AnyProgram:
    """See `Program.only`."""
    _require_known(program, names)
    return replay(program, names)


def without(program: AnyProgram, name: str) -> AnyProgram:
    """See `Program.without`."""
    if name not in program.adapters and any(_is_of(r, name) for r in program.history):
        _require_no_other_shapes(program, name)
        return replay(program, program.adapters, left_out=name)
    _require_known(program, (name,), [r.applied.text for r in program.history if not r.adapter])
    return replay(program, [a for a in program.adapters if a != name])


def _require_no_other_shapes(program: State, name: str) -> None:
    """Raises PassError if adapters have the shapes that the steps of a pass gave them."""
    steps = [i for i, r in enumerate(program.history) if _is_of(r, name)]
    last = program.history[steps[-1]]
    earlier = [r.adapter for r in program.history[: steps[-1]] if r.adapter is not None]
    later = [r.adapter for r in program.history[steps[0] :] if r.adapter is not None]
    if last.applied.reshapes and (adapters := list(dict.fromkeys([*earlier, *later]))):
        raise PassError(
            f"{last.text} gave other shapes to what {', '.join(adapters)} train, so their values "
            "are none without it. Leave these adapters out first, or keep the program from before."
        )


def _require_known(program: State, names: Sequence[str], passes: Sequence[str] = ()) -> None:
    for name in names:
        if name not in program.adapters:
            also = f" Other passes: {', '.join(dict.fromkeys(passes))}." if passes else ""
            raise PassError(
                f"there is no adapter {name!r}. Adapters: {', '.join(program.adapters) or 'none'}; "
                f"nearest: {nearest(name, [*program.adapters, *passes])}.{also}"
            )


def load_values(
    program: State, tensors: Mapping[str, torch.Tensor], reshaped: bool = False
) -> None:
    """Copies values into a program's own branch, trained and updated base tensors, by name.

    Where a tensor has no storage yet (meta device), it gets that of the value. With `reshaped`,
    a later pass gives tensors the shape that their values have: those are left for then.
    """
    in_module = dict(program.module.named_parameters()) | dict(program.module.named_buffers())
    mine = program.tensors.trained | state_tensors(program.module)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in in_module and (name.startswith(f"{BRANCHES}.") or name in mine):
                own = in_module[name]
                if reshaped and own.shape != tensor.shape:
                    continue
                if not own.is_meta or tensor.is_meta:
                    own.copy_(placed_like(whole(tensor), own))
                elif isinstance(own, nn.Parameter):
                    set_attribute(
                        program.module, name, nn.Parameter(tensor.clone(), own.requires_grad)
                    )
                else:
                    set_attribute(program.module, name, tensor.clone())
