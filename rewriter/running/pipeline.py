"""Running and replaying passes: plan, fork, edit, propagate, check, record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..aten import set_attribute
from ..edits.edit import Editor
from ..errors import PassError, RewriteError
from ..program import BRANCHES, Program, Record
from ..sharded import placed_like, require_whole, whole
from .checks import Checks, Skipped
from .passes import Pass, Plan
from .propagate import propagate
from .syntax import Passes, as_pipeline
from .verify import Certificate


def run(
    program: Program,
    passes: Passes,
    *,
    data: Any = None,
    sources: Sequence[Any] = (),
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Applies passes to a copy of `program`; the argument is never changed.

    Args:
        program: what to rewrite.
        passes: a Pass, a list of them, text such as `"lora{rank=8,where=q|v};fold"`, or the path
            of a YAML recipe.
        data, sources: handed to each pass's `plan`.
        progress: called with each pass's text before it runs.

    Returns:
        The rewritten program, verified; its `history` has one record a pass.

    Raises:
        RewriteError: the first pass that fails; nothing is changed.
    """
    if not isinstance(program, Program):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PassError(
            f"run takes a Program, not {type(program).__name__}; capture the model first."
        )
    if torch.is_inference_mode_enabled():  # tensors made there can never train
        with torch.inference_mode(False):
            return run(program, passes, data=data, sources=sources, progress=progress)
    if program.training:  # another thread may move what trains meanwhile, and batch statistics
        program = program.fork()
    done: list[str] = []
    checks: Checks | None = None
    for item in as_pipeline(passes):
        if progress is not None:
            progress(str(item))
        try:
            if not item.sharded:
                require_whole(program.module, item.text)
            checks = checks or Checks(program)
            program = _step(program, item, data, sources, checks)
        except RewriteError as error:
            after = f" after {', '.join(done)}" if done else ""
            error.add_note(f"while running {item}{after}")
            raise
        done.append(str(item))
    return program


def _step(
    program: Program, item: Pass, data: Any, sources: Sequence[Any], checks: Checks
) -> Program:
    """Plans and applies one pass; whatever it raises, it must not have changed the program."""
    checks.begin()
    try:
        started = time.perf_counter()
        plan = item.plan(program, data, sources)
        return apply_plan(program, item, plan, time.perf_counter() - started, checks=checks)
    except Exception:
        checks.unmoved(item)
        raise


def apply_plan(
    program: Program,
    item: Pass,
    plan: Plan,
    planned: float = 0.0,
    check: bool = True,
    checks: Checks | None = None,
) -> Program:
    """Applies one planned pass transactionally: fork, edit, propagate, check, record.

    `checks` are those of a pipeline, begun before the pass planned.
    """
    if item.adapter is not None and item.adapter in program.adapters:
        raise PassError(
            f"there is an adapter {item.adapter!r} already; give this one another name: "
            f"{item.text}{{name=...}}."
        )
    clock = [time.perf_counter()]
    fork = program.fork()
    clock.append(time.perf_counter())
    edit = _edited(fork, item, plan)
    clock.append(time.perf_counter())
    after = edit.program
    certificate, left = Certificate("unchecked"), Skipped()
    decided = replace(plan, decisions=edit.decided)
    propagate(after)
    if check:
        certificate, left = (checks or Checks(program)).finish(after, item, decided, _edited)
        certificate = replace(certificate, measured={**certificate.measured, **edit.figures})
    clock.append(time.perf_counter())
    spans = (b - a for a, b in itertools.pairwise(clock))
    seconds = dict(zip(("fork", "edit", "check"), spans, strict=True)) | {"plan": planned}
    edited = tuple(dict.fromkeys(edit.edited))
    record = Record(
        str(item),
        item.adapter,
        edited,
        (*edit.skipped, *left),
        certificate,
        seconds,
        item,
        decided,
    )
    return replace(after, history=(*program.history, record))


def _edited(fork: Program, item: Pass, plan: Plan) -> Editor:
    """The editor after a planned pass has edited its fork."""
    edit = Editor(fork, item.adapter, getattr(item, "seed", 0), plan.decisions)
    if item.adapter is not None:
        edit.freeze(keep={n for names in fork.owned.values() for n in names})
    item.apply(edit, plan)
    if item.adapter is not None and not edit.edited:
        site, reason = edit.skipped[0] if edit.skipped else ("", "there is no site")
        raise PassError(
            f"{item}: none of the selected sites could be edited, first {site}: {reason}. Choose "
            "others with where=."
        )
    edit.finish()
    return edit


def replay_steps(
    program: Program, adapters: Sequence[str] | None = None
) -> Iterator[tuple[Record, Program, Program]]:
    """Rebuilds a program from its base, step by step, with its current values.

    Yields (record, before, after); `after` of an inserting pass holds freshly initialised
    branches as far as its certificate goes, and the current values from the next step on.
    """
    names = program.adapters if adapters is None else tuple(adapters)
    current = program.base
    steps = [(r, p) for r in program.history if (p := _kept(r, names)) is not None]
    for index, (record, plan) in enumerate(steps):
        before = current
        current = apply_plan(current, record.applied, plan, check=False)
        kept = replace(current.history[-1], certificate=record.certificate)
        current.history = (*current.history[:-1], kept)
        yield record, before, current
        reshaped = any(r.applied.reshapes for r, _ in steps[index + 1 :])
        for name in current.adapters:
            load_values(current, program.adapter_tensors(name), reshaped)


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
    return replace(plan, decisions={**plan.decisions, "branches": of_them})


def replay(program: Program, adapters: Sequence[str]) -> Program:
    """The program with only the given adapters, rebuilt from its base without random choices."""
    current = program.base.fork()
    for _, _, after in replay_steps(program, adapters):
        current = after
    current.module.train(program.training)
    return current


def load_values(
    program: Program, tensors: Mapping[str, torch.Tensor], reshaped: bool = False
) -> None:
    """Copies values into a program's own branch and trained base tensors, by name.

    Where a tensor has no storage yet (meta device), it gets that of the value. With `reshaped`,
    a later pass gives tensors the shape that their values have: those are left for then.
    """
    held = dict(program.module.named_parameters()) | dict(program.module.named_buffers())
    owned = {n for names in program.owned.values() for n in names}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in held and (name.startswith(f"{BRANCHES}.") or name in owned):
                own = held[name]
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
