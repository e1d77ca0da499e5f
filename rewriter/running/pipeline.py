"""Running passes: plan, fork, edit, propagate, check, record."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..edits.edit import Editor
from ..edits.trained import require_owned
from ..errors import PassError, RewriteError
from ..fingerprint import require_unchanged, take
from ..module import all_read, outside_inference
from ..program import Program, Record
from ..sharded import require_whole
from ..turns import alone
from .checks import Checks, Skipped
from .passes import Pass, Plan
from .propagate import propagate
from .syntax import Passes, as_pipeline
from .trials import left_out
from .verify import Certificate, is_meta

_TOO_LARGE = re.compile("memory|overflow", re.IGNORECASE)
"""What torch says where it cannot allocate."""


@outside_inference
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
    require_owned(program)
    require_unchanged(program)
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


@outside_inference
def apply_plan(
    program: Program,
    item: Pass,
    plan: Plan,
    planned: float = 0.0,
    check: bool = True,
    checks: Checks | None = None,
    owned: bool = False,
) -> Program:
    """Applies one planned pass transactionally: fork, edit, propagate, check, record.

    Args:
        program, item, plan: the pass, and what it decided for this program.
        planned: seconds that planning took.
        check: measure what the pass promises.
        checks: those of a pipeline, begun before the pass planned.
        owned: the program is a fork that nothing else holds, so it is edited itself; after an
            error it is of no use any more. Only without checks, which compare with what it was,
            and where the step before left nothing that a fork would leave out.
    """
    if item.adapter is not None and item.adapter in program.adapters:
        raise PassError(
            f"there is an adapter {item.adapter!r} already; give this one another name: "
            f"{item.text}{{name=...}}."
        )
    require_owned(program)
    clock = [time.perf_counter()]
    owned = owned and not check and all_read(program.module)
    fork = replace(program) if owned else program.fork()
    clock.append(time.perf_counter())
    with alone():
        edit = _edited(fork, item, plan)
        clock.append(time.perf_counter())
        after = edit.program
        propagate(after, item.text)
    after.prints = take(after)
    certificate, left, notes = Certificate("unchecked"), Skipped(), [*edit.notes]
    decided = replace(plan, decisions=edit.decided, tensors={**plan.tensors, **edit.tensors})
    if check:
        checks = checks or Checks(program)
        certificate, left = checks.finish(after, item, decided, _edited)
        figures = {**edit.figures, **checks.examine(item, program, after)}
        certificate = replace(certificate, measured={**certificate.measured, **figures})
        notes += () if is_meta(after) else left_out(after)
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
        tuple(notes),
    )
    return replace(after, history=(*program.history, record))


def _edited(fork: Program, item: Pass, plan: Plan) -> Editor:
    """The editor after a planned pass has edited its fork."""
    edit = Editor(fork, item.adapter, item.random_seed, plan.decisions, item.text)
    if item.adapter is not None:
        edit.freeze()
    try:
        item.apply(edit, plan)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RewriteError) or not _TOO_LARGE.search(str(error) or "memory"):
            raise
        raise PassError(
            f"{item}: its tensors do not fit into memory ({str(error).splitlines()[0][:200]}). "
            "Choose smaller sizes, or fewer sites with where=."
        ) from error
    if item.adapter is not None and not edit.edited:
        if not edit.skipped:
            raise PassError(
                f"{item.text}: it edited nothing at {_listed(plan)} and gave no reason. insert or "
                "insert_all must hand branches to the editor (edit.add, edit.after, ...), or say "
                "why a site is left alone (edit.skip)."
            )
        site, reason = edit.skipped[0]
        raise PassError(
            f"{item}: none of the selected sites could be edited, first {site}: {reason}. Choose "
            "others with where=."
        )
    edit.finish()
    return edit


def _listed(plan: Plan) -> str:
    sites: Sequence[str] = plan.decisions.get("sites", ())
    more = ", ..." if len(sites) > 3 else ""
    return f"its {len(sites)} sites ({', '.join(sites[:3])}{more})"
