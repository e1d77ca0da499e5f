"""Running passes: plan, fork, edit, propagate, check, record."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from ..edits.calls.requirements import failing_branch
from ..edits.edit import Editor
from ..errors import PassError, RewriteError
from ..graph.module import all_read
from ..graph.outside import outside_modes
from ..graph.sharded import is_sharded, require_whole
from ..graph.turns import alone
from ..graph.walks import settled
from ..measure.trials import left_out
from ..pipeline.passes import Pass
from ..pipeline.syntax import Passes, as_pipeline
from ..program.history import Certificate, Plan, Record
from ..program.state import AnyProgram, State
from ..program.text import with_names
from ..program.trained import require_owned
from ..program.unchanged import require_unchanged
from ..tracing.propagate import propagate
from ..verify.checks import Checks, Skipped
from ..verify.intact import numbers, require_numbers
from ..verify.verify import is_meta
from .allocation import Allocation, UnexplainedError, require_room

_TOO_LARGE = re.compile("memory|overflow", re.IGNORECASE)
"""What torch says where it cannot allocate."""


@outside_modes
def run(
    program: AnyProgram,
    passes: Passes,
    *,
    data: Any = None,
    sources: Sequence[Any] = (),
    progress: Callable[[str], None] | None = None,
) -> AnyProgram:
    """Applies passes to a copy of `program`; the argument is never changed.

    Args:
        program: what to rewrite.
        passes: a Pass, a list of them, text such as `"lora{rank=8,where=q|v};fold"`, the path of a
            YAML recipe, or a configuration of PEFT's.
        data, sources: handed to each pass's `plan`.
        progress: called with each pass's text before it runs.

    Returns:
        The rewritten program, verified; its `history` has one record a pass.

    Raises:
        RewriteError: the first pass that fails; nothing is changed.
    """
    if not isinstance(program, State):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PassError(
            f"run takes a Program, not {type(program).__name__}; capture the model first."
        )
    with settled(program.module, program.base.module):
        require_owned(program)
        require_unchanged(program)
        require_numbers(program)
    if program.training:  # another thread may move what trains meanwhile, and batch statistics
        program = program.fork()
    done: list[str] = []
    checks: Checks | None = None
    for item in as_pipeline(passes):
        if progress is not None:
            progress(str(item))
        try:
            with settled(program.module, program.base.module):
                if not item.sharded:
                    require_whole(program.module, item.text)
                checks = checks or Checks(program)
            program = _step(program, item, data, sources, checks)
        except RewriteError as error:
            after = f" after {', '.join(done)}" if done else ""
            error.add_note(f"while running {item}{after}")
            raise
        done.append(str(item))
    if checks is not None:
        checks.keep()
    return program


def _step(
    program: AnyProgram, item: Pass, data: Any, sources: Sequence[Any], checks: Checks
) -> AnyProgram:
    """Plans and applies one pass; whatever it raises, it must not have changed the program."""
    checks.begin()
    try:
        started = time.perf_counter()
        with _sizes_named(program):
            plan = item.plan(program, data, sources)
        result = apply_plan(program, item, plan, time.perf_counter() - started, checks=checks)
        checks.end(result)
        return result
    except Exception:
        checks.unmoved(item)
        raise


@outside_modes
def apply_plan(
    program: AnyProgram,
    item: Pass,
    plan: Plan,
    planned: float = 0.0,
    check: bool = True,
    checks: Checks | None = None,
    elements: int | None = None,
    owned: bool = False,
) -> AnyProgram:
    """Applies one planned pass transactionally: fork, edit, propagate, check, record.

    Args:
        program, item, plan: the pass, and what it decided for this program.
        planned: seconds that planning took.
        check: measure what the pass promises.
        checks: those of a pipeline, begun before the pass planned.
        elements: how many the tensors may have that the pass makes, for plans that anybody may
            have written.
        owned: the program is a fork that nothing else holds, so it is edited itself; after an
            error it is of no use any more, and behind the last step it is to be completed. Only
            without checks, which compare with what it was, and where the step before left nothing
            that a fork would leave out.
    """
    if item.adapter is not None and item.adapter in program.adapters:
        raise PassError(
            f"there is an adapter {item.adapter!r} already; give this one another name: "
            f"{item.text}{{name=...}}."
        )
    clock = [time.perf_counter()]
    with settled(program.module):
        require_owned(program)
        owned = owned and not check and all_read(program.module)
        fork = replace(program) if owned else program.fork(printed=False)
    clock.append(time.perf_counter())
    with alone(), _sizes_named(fork):
        edit = _edited(fork, item, plan, elements)
    clock.append(time.perf_counter())
    after, decided = edit.program, replace(plan, decisions=edit.decided, tensors=edit.tensors)
    certificate, left, notes = Certificate("unchecked"), Skipped(), [*edit.notes]
    with contextlib.nullcontext() if owned else settled(after.module):
        with alone(), _sizes_named(fork):
            propagate(after, item.text, partial(failing_branch, after))
        if not owned:
            complete(after)
        if check:
            _require_room(program, after, item)
            checks = checks or Checks(program)
            certificate, left = checks.finish(after, item, decided, _edited)
            figures = {**edit.figures, **checks.examine(item, program, after)}
            certificate = replace(certificate, measured={**certificate.measured, **figures})
            notes += () if is_meta(after) else left_out(after)
    clock.append(time.perf_counter())
    spans = (b - a for a, b in itertools.pairwise(clock))
    seconds = dict(zip(("fork", "edit", "check"), spans, strict=True)) | {"plan": planned}
    edited = tuple(dict.fromkeys(edit.edited))
    skipped = tuple((site, with_names(why, after.symbols)) for site, why in edit.skipped)
    record = Record(
        str(item),
        item.adapter,
        edited,
        (*skipped, *left),
        certificate,
        seconds,
        item,
        decided,
        tuple(notes),
    )
    return cast(AnyProgram, replace(after, history=(*program.history, record)))


def complete(program: State) -> None:
    """Gives a program that was edited its fingerprints and numbers."""
    program.prints, program.numbers = program.fingerprints(), numbers(program)


@contextlib.contextmanager
def _sizes_named(program: State) -> Generator[None]:
    """Lets errors call sizes what the spec calls them, torch's own text included."""
    try:
        yield
    except RewriteError as error:
        error.args = tuple(
            with_names(a, program.symbols) if isinstance(a, str) else a for a in error.args
        )
        raise


def _edited(fork: State, item: Pass, plan: Plan, elements: int | None = None) -> Editor:
    """The editor after a planned pass has edited its fork."""
    about = plan.decisions, item.text, plan.tensors
    edit = Editor(fork, item.adapter, item.random_seed, *about)
    if item.adapter is not None:
        edit.freeze()
    try:
        with Allocation(elements):
            item.apply(edit, plan)
    except UnexplainedError as error:
        raise PassError(
            f"{item}: it makes more than its saved tensors and the model explain ({error}). Its "
            "options or decisions were altered: save the adapter again."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RewriteError) or not (
            isinstance(error, MemoryError) or _TOO_LARGE.search(str(error))
        ):
            raise
        raise _too_large(item, error) from error
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


def _too_large(item: Pass, error: Exception) -> PassError:
    first = (str(error).splitlines() or ["no memory"])[0][:200]
    return PassError(
        f"{item}: its tensors do not fit into memory ({first}). Choose smaller sizes, or fewer "
        "sites with where=."
    )


def _require_room(before: State, after: State, item: Pass) -> None:
    """PassError unless memory holds what a pass made once more: it is made again to measure it."""
    old = {id(t) for t in before.module.parameters()}
    new = [t for t in after.named_trainable_parameters().values() if id(t) not in old]
    try:
        require_room(sum(t.nbytes for t in new if t.device.type == "cpu" and not is_sharded(t)))
    except MemoryError as error:
        raise _too_large(item, error) from error


def _listed(plan: Plan) -> str:
    sites: Sequence[str] = plan.decisions.get("sites", ())
    more = ", ..." if len(sites) > 3 else ""
    return f"its {len(sites)} sites ({', '.join(sites[:3])}{more})"
