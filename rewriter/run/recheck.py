"""Checking what a program has become: its history replayed and measured again."""

from __future__ import annotations

from dataclasses import replace

from ..errors import VerifyError
from ..graph.module import state_tensors
from ..graph.outside import outside_modes
from ..measure.as_trained import require_kept
from ..measure.steady import perturbed
from ..measure.trials import sizes
from ..measure.witness import Witness, repeats, sharing
from ..program.history import Certificate
from ..program.state import State
from ..program.unchanged import require_unchanged
from ..verify.intact import (
    close,
    marks,
    require_numbers,
    require_recorded,
    require_values,
    tensors,
    unsaved,
)
from ..verify.known import keep, recalled
from ..verify.verify import bound, certify, check_graph, is_meta, measure
from .replay import replay, replay_steps


def _draws(base: Witness, program: State) -> bool:
    return repeats(base, sizes(program)[0]).startswith("random")


def _require_kept(program: State, base: Witness) -> None:
    """Raises VerifyError for what initial values of branches hide, see `as_trained`."""
    said = {r.adapter: r.applied.departures for r in program.history if r.adapter is not None}
    paths = {a.path: said.get(a.adapter, frozenset[str]()) for a in program.attachments}
    random = base.expected or (not base.settled and _draws(base, program))
    with perturbed(Witness(program), program.named_trainable_parameters()) as moved:
        require_kept(moved, sizes(program)[0], paths, random, "the program")


@outside_modes
def verify_program(program: State) -> list[Certificate]:
    """See `Program.verify`: replays the history from the base and measures each step again."""
    if program.training:  # another thread may move what trains meanwhile, and batch statistics
        program = program.fork()
    check_graph(program)
    require_unchanged(program)
    require_values(program)
    require_numbers(program)
    certificates: list[Certificate] = []
    if is_meta(program):
        steps = enumerate(program.history, 1)
        return [Certificate("unmeasured", step=f"{n} {r.text}") for n, r in steps]
    last, left = program.base, {a.path for a in program.attachments}
    base = recalled(last, marks(last))
    for number, (record, before, after) in enumerate(replay_steps(program), 1):
        seen = base.witness if before is program.base else Witness(before)
        inserted = {a.path for a in after.attached_by(record.adapter or "")}
        again = bool(inserted) and inserted <= left  # see `_require_kept`
        certificate = certify(record.applied.promise(), seen, Witness(after), again)
        certificates.append(replace(certificate, step=f"{number} {record.text}"))
        record.applied.examine(before, after)
        last = after
    keep(base)
    if program.history:
        require_recorded(last, program)
        _require_kept(program, base.witness)
        with sharing(Witness(last)):
            measured = measure(last, program)
        allowed = bound(program, measured)
        if measured["max_rel"] > allowed:
            raise VerifyError(
                "the program is not what its history says: replaying the history gives outputs "
                f"that differ by {measured['max_rel']:.3g} of an output's largest value (allowed "
                f"{allowed:.3g}). A tensor was changed outside of training, or a merge is wrong."
            )
        certificates.append(Certificate("replayed", measured, step="all passes"))
    return certificates


def require_remade(program: State) -> None:
    """Raises VerifyError if a branch holds values, changed since the pass, that an artifact loses.

    Replays the history only where there are such tensors. What a forward has cached since is no
    part of what the pass made.
    """
    require_numbers(program)
    names = [n for n in unsaved(program) if n not in state_tensors(program.module)]
    if not names:
        return
    want, got = tensors(program), tensors(replay(program, program.adapters))
    for name in names:
        if name in got and not close(got[name], want[name]):
            raise VerifyError(
                f"{name} was changed outside of training, and would be lost by saving: it is not "
                "persistent, and replaying the history gives other values. Register it as a "
                "persistent buffer, or give it its old values back."
            )
