"""A whole program verified: its history is replayed, and every contract measured again."""

from __future__ import annotations

from ..errors import VerifyError
from ..fingerprint import require_unchanged
from ..program import Program
from .as_trained import require_kept
from .intact import require_numbers, require_recorded, require_values
from .replay import replay_steps
from .steady import perturbed
from .trials import sizes
from .verify import Certificate, bound, certify, check_graph, is_meta, measure
from .witness import Witness, repeats


def _require_kept(program: Program) -> None:
    """Raises VerifyError for what initial values of branches hide, see `as_trained`."""
    said = {r.adapter: r.applied.departures for r in program.history if r.adapter is not None}
    paths = {a.path: said.get(a.adapter, frozenset[str]()) for a in program.attachments}
    moved = perturbed(program)
    random = repeats(Witness(program.base), sizes(program)[0]).startswith("random")
    require_kept(moved, sizes(program)[0], paths, random, "the program")


def verify_program(program: Program) -> list[Certificate]:
    """See `Program.verify`: replays the history from the base and measures each step again."""
    if program.training:  # another thread may move what trains meanwhile, and batch statistics
        program = program.fork()
    check_graph(program)
    require_unchanged(program)
    require_values(program)
    require_numbers(program)
    found: list[Certificate] = []
    if is_meta(program):
        return [Certificate("unmeasured") for _ in program.history]
    last = program.base
    for record, before, after in replay_steps(program):
        found.append(certify(record.applied.promise(), Witness(before), Witness(after)))
        record.applied.examine(before, after)
        last = after
    if program.history:
        require_recorded(last, program)
        _require_kept(program)
        measured = measure(last, program)
        allowed = bound(program, measured)
        if measured["max_rel"] > allowed:
            raise VerifyError(
                "the program is not what its history says: replaying the history gives outputs "
                f"that differ by {measured['max_rel']:.3g} of an output's largest value (allowed "
                f"{allowed:.3g}). A tensor was changed outside of training, or a merge is wrong."
            )
        found.append(Certificate("replayed", measured))
    return found
