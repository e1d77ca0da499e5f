"""All that is checked of a pass: taken before it plans, and compared with what it made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..edits.edit import Editor
from ..errors import VerifyError
from ..graph.turns import alone
from ..measure.as_trained import require_kept
from ..measure.reach import unreached
from ..measure.steady import perturbed
from ..measure.trials import sizes
from ..measure.watch import branches, watched
from ..measure.witness import Witness, sharing, whole_tensors
from ..pipeline.passes import Pass
from ..pipeline.syntax import parse
from ..program.history import Certificate, Plan
from ..program.state import State
from .intact import Mark, marks, require_names, require_others, require_saved, require_unmoved
from .verify import certify, check_graph, is_meta

Redo = Callable[[State, Pass, Plan], Editor]

Skipped = tuple[tuple[str, str], ...]


class Checks:
    """Checks one pass after the other; what a pass made is what the next one starts from.

    Args:
        program: that the first pass is given.
    """

    def __init__(self, program: State) -> None:
        self.witness = None if is_meta(program) else Witness(program)
        self.before: Witness | None = None
        """Of the program that the last pass was given."""
        self.program = program
        self.departures = {d for r in program.history for d in r.applied.departures}
        """What the passes so far do not keep."""
        self._marks: Mapping[str, Mark] = {}
        self.begin()

    def begin(self) -> None:
        """Before a pass plans: remembers what the program is and does."""
        self._marks = marks(self.program)
        if self.witness is not None:
            for inputs in sizes(self.program):
                self.witness.outputs(inputs)

    def examine(self, item: Pass, before: State, after: State) -> Mapping[str, float]:
        """What a pass measures beside its contract, with the outputs that are known already."""
        with sharing(*([] if self.before is None else [self.before])):
            return item.examine(before, after)

    def unmoved(self, item: Pass) -> None:
        """Raises VerifyError if the program is not what it was when the pass began."""
        require_unmoved(self.program, self._marks, str(item))

    def finish(
        self, after: State, item: Pass, plan: Plan, redo: Redo
    ) -> tuple[Certificate, Skipped]:
        """After a pass has made a program of that which it was given.

        Args:
            after: what it made.
            item, plan: the pass, and all that was decided.
            redo: applies a pass to a fork.

        Returns:
            The certificate, and what the pass trains although no gradient reaches it.

        Raises:
            VerifyError: a promise is broken.
        """
        before = self.program
        self.unmoved(item)
        check_graph(after)
        require_names(before, after, str(item))
        if self.witness is None:
            self.program, self._marks = after, marks(after)
            return Certificate("unmeasured"), ()
        contract, made = item.promise(), Witness(after)
        require_others(before, after, item, contract.kind == "trainable")

        def again() -> State:
            read = replace(plan, decisions=json.loads(json.dumps(dict(plan.decisions))))
            (same,) = parse(str(item))
            with alone():
                return redo(before.fork(), same, read).program

        if item.portable:
            require_saved(before, after, str(item), again)
        with watched(made, str(item)):
            certificate = certify(contract, self.witness, made)
            missing = _unreached(before, made, item)
        if item.adapter is not None:
            self._require_trained(after, item)
        self.program, self.before, self._marks = after, self.witness, marks(after)
        self.witness = made
        self.departures |= item.departures
        return certificate, missing

    def _require_trained(self, after: State, item: Pass) -> None:
        """Raises VerifyError for what the initial values of an adapter hide."""
        before = self.program
        old = before.named_trainable_parameters()
        moved = perturbed(after, [n for n in after.named_trainable_parameters() if n not in old])
        random = self.witness is not None and self.witness.expected
        with watched(moved, str(item)):
            paths = [p for p in branches(moved) if not before.inserts(f"{p}.")]
            said = dict.fromkeys(paths, item.departures)
            require_kept(moved, sizes(after)[0], said, random, str(item), self.departures)


def _unreached(before: State, made: Witness, item: Pass) -> Skipped:
    """What an adapter trains and no gradient reaches, as (name, reason).

    Raises:
        VerifyError: the adapter's own doing, or nothing that it trains gets a gradient.
    """
    if item.adapter is None or not whole_tensors(made.program):
        return ()
    old = before.named_trainable_parameters()
    fresh = [n for n in made.program.named_trainable_parameters() if n not in old]
    missing = unreached(made, fresh, sizes(made.program)[0], str(item))
    fault = [n for n, reason in missing.items() if reason == "branch"]
    if fault:
        raise VerifyError(
            f"{item}: no gradient reaches {fault[0]} ({len(fault)} of {len(fresh)} new "
            "parameters): its branch does not use it, or detaches it."
        )
    if missing and len(missing) == len(fresh):
        raise VerifyError(
            f"{item}: no gradient reaches any of its {len(fresh)} parameters (first: {fresh[0]}), "
            "because the model detaches those places or makes integers of them. Choose others "
            "with where=."
        )
    return tuple((n, "no gradient reaches it: the model detaches it there") for n in missing)
