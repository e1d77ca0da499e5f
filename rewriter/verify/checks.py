"""All that is checked of a pass: taken before it plans, and compared with what it made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ..edits.edit import Editor
from ..errors import VerifyError
from ..graph.turns import alone
from ..graph.walks import settle, settled
from ..measure.as_trained import require_kept
from ..measure.reach import unreached
from ..measure.steady import perturbed
from ..measure.trials import sizes, small
from ..measure.watch import branches, watched
from ..measure.witness import Witness, different, sharing, whole_tensors
from ..pipeline.passes import Pass
from ..pipeline.syntax import parse
from ..program.history import Certificate, Plan
from ..program.state import State
from .apart import only_branches, resting
from .intact import marks, require_names, require_others, require_saved, require_unmoved
from .known import keep, known, recalled
from .silence import silenced
from .verify import certify, check_graph, is_meta

Redo = Callable[[State, Pass, Plan], Editor]

Skipped = tuple[tuple[str, str], ...]


class Checks:
    """Checks one pass after the other; what a pass made is what the next one starts from.

    Args:
        program: that the first pass is given, just found unchanged (`require_unchanged`).
    """

    def __init__(self, program: State) -> None:
        self.program = program
        self._marks = marks(program)
        self._known = [] if is_meta(program) else [recalled(program, self._marks)]
        self.witness = self._known[0].witness if self._known else None
        self.before: Witness | None = None
        """Of the program that the last pass was given."""
        self.departures = {d for r in program.history for d in r.applied.departures}
        """What the passes so far do not keep."""
        self.begin()

    def begin(self) -> None:
        """Before a pass plans: remembers what the program does."""
        if self.witness is None:
            return
        rounds = sizes(self.program)
        if self.program.adapters and only_branches(self.program):
            rounds = rounds[:1]  # of others that come with a further adapter, see `resting`
        for inputs in rounds:
            self.witness.outputs(inputs)

    def end(self, program: State) -> None:
        """After a pass, once its program has the record of it."""
        self.program = program
        if self.witness is not None:
            self.witness.program = program

    def keep(self) -> None:
        """After the last pass: what is known of the programs helps the next run."""
        for each in self._known:
            keep(each)

    def examine(self, item: Pass, before: State, after: State) -> Mapping[str, float]:
        """What a pass measures beside its contract, with the outputs that are known already."""
        with sharing(*(w for w in (self.before, self.witness) if w is not None)):
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
        with settled(before.module, before.base.module, after.module):
            return self._finished(after, item, plan, redo)

    def _finished(
        self, after: State, item: Pass, plan: Plan, redo: Redo
    ) -> tuple[Certificate, Skipped]:
        before = self.program
        check_graph(after)
        require_names(before, after, str(item))
        if self.witness is None:
            self.program, self._marks = after, marks(after)
            return Certificate("unmeasured"), ()
        contract, witness = item.promise(), Witness(after)
        settle(witness.gm)
        require_others(before, after, item, contract.kind == "trainable")

        def again() -> State:
            read = replace(plan, decisions=json.loads(json.dumps(dict(plan.decisions))))
            (same,) = parse(str(item))
            with alone():
                return redo(before.fork(), same, read).program

        if item.portable:
            require_saved(before, after, str(item), again)
        measured = self._apart(witness, item) or self._measured(self.witness, witness, item)
        self.program, self.before, self._marks = after, self.witness, marks(after)
        self.witness = witness
        self._known.append(known(witness, self._marks))
        self.departures |= item.departures
        return measured

    def _apart(self, after: Witness, item: Pass) -> tuple[Certificate, Skipped] | None:
        """What is measured of a further adapter while the others rest, see `resting`; None where
        they may not, or where that does not show that the contract holds."""
        paths = resting(self.program, after.program) if item.promise().kind == "identity" else []
        if self.witness is None or not paths:
            return None
        inputs = sizes(after.program)[0]
        if different(self.witness.outputs(inputs), after.outputs(inputs)):
            return None
        base = self.program.base
        bare = recalled(base, marks(base))
        try:
            with silenced(after.gm, paths, only_added=True):
                return self._measured(bare.witness, after.again(), item, paths)
        except VerifyError:  # with all of them there may be more to say
            return None
        finally:
            keep(bare)

    def _measured(
        self, before: Witness, witness: Witness, item: Pass, rest: Collection[str] = ()
    ) -> tuple[Certificate, Skipped]:
        """The contract, and of an adapter gradients and what its initial values hide.

        Args:
            before: of the program that the pass was given, or of one that does the same.
            witness: of what the pass made.
            rest: paths of the branches that rest meanwhile.
        """
        after = witness.program
        paths = {a.path for a in after.attachments} - set(rest)
        with watched(witness, str(item), paths if rest else None):
            certificate = certify(item.promise(), before, witness, item.adapter is not None)
            if item.adapter is None:
                return certificate, ()
            old = self.program.named_trainable_parameters()
            fresh = [n for n in after.named_trainable_parameters() if n not in old]
            missing = _unreached(witness, fresh, str(item))
        with perturbed(witness, fresh) as moved, watched(moved, str(item), paths if rest else None):
            added = [p for p in branches(moved, paths) if not self.program.inserts(f"{p}.")]
            said = dict.fromkeys(added, item.departures)
            inputs = sizes(after)[0]
            calls = before.program.module.graph.find_nodes(op="call_module")
            settled = {str(n.target) for n in calls} if before.settled else None
            earlier = self.departures
            require_kept(moved, inputs, said, before.expected, str(item), earlier, settled)
        return certificate, missing


def _unreached(after: Witness, fresh: Collection[str], what: str) -> Skipped:
    """Which of the parameters that an adapter adds no gradient reaches, as (name, reason).

    Raises:
        VerifyError: the adapter's own doing, or nothing that it trains gets a gradient.
    """
    if not whole_tensors(after.program):
        return ()
    missing = _without_gradient(after, fresh, what)
    fault = [n for n, reason in missing.items() if reason == "branch"]
    if fault:
        raise VerifyError(
            f"{what}: no gradient reaches {fault[0]} ({len(fault)} of {len(fresh)} new "
            "parameters): its branch does not use it, or detaches it."
        )
    if missing and len(missing) == len(fresh):
        raise VerifyError(
            f"{what}: no gradient reaches any of its {len(fresh)} parameters (first: "
            f"{next(iter(fresh))}), because the model detaches those places or makes integers of "
            "them. Choose others with where=."
        )
    return tuple((n, "no gradient reaches it: the model detaches it there") for n in missing)


def _without_gradient(after: Witness, fresh: Collection[str], what: str) -> Mapping[str, str]:
    """See `unreached`. Propagation has shown that no branch decides anything by its sizes, so a
    gradient that arrives at small ones arrives; where one does not, or something fails, the usual
    sizes tell."""
    inputs = small(after.program)
    with contextlib.suppress(Exception):
        if inputs is not None and not unreached(after, fresh, inputs, what):
            return {}
    return unreached(after, fresh, sizes(after.program)[0], what)
