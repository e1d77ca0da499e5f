"""Fold: turn trained branches into constants of the base weights, and drop them.

Peephole rules run to a fixpoint from the inside out (`rewriter/edits/folding/fold.py`). What cannot
be folded stays in the graph and is reported with the reason. Merging runs in at least float32 with
one rounding. The certificate says what that did: `delta_lost` is the largest rounding error of one
weight, relative to its change (it may be large where errors of many elements cancel), and
`outputs_kept` how much is left of what all branches together add to the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.folding.fold import fold
from ...rewriter.edits.folding.result import warn_of
from ...rewriter.errors import FoldError, VerifyError, nearest
from ...rewriter.graph.sharded import has_shards
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.state import State
from ...rewriter.run.before_fold import keep_trained, trained_tensors
from ...rewriter.verify.verify import bound, is_meta, measure
from ...rewriter.weights.exported import put_back


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Folds adapters into the base weights.

    Attributes:
        names: which adapters; all by default. A named adapter that cannot be folded is an error.
        tied: where something else reads a weight, too (a head tied to an embedding): refuse, keep
            (the branch), untie or both (change the shared tensor, so outputs change; by how much is
            measured and not limited). Other names of a weight that nothing else reads do not
            matter: all of them are written.
        lossy: also into weights in few bits (quantise, peqa), which are packed again, in the same
            way; the record says what is left of each change, and outputs change by that. What is
            written is never further from what the branches compute than the weight was.
    """

    contract: ClassVar[Contract] = Contract("bounded")
    sharded: ClassVar[bool] = True

    names: tuple[str, ...] | None = None
    tied: Literal["refuse", "keep", "untie", "both"] = "refuse"

    lossy: bool = False

    def promise(self) -> Contract:
        free = self.tied == "both" or self.lossy
        return Contract("trainable") if free else self.contract

    def examine(self, before: State, after: State) -> Mapping[str, float]:
        """What the original model computes with the exported tensors, where it has a place for
        all of them: names are what it reads them by, and not all names are its own tensors."""
        changed = after.attachments or after.added or after.untied or after.reshaped()
        if changed or self.tied == "both" or is_meta(after) or has_shards(after.module):
            return {}
        same = after if self.lossy else before
        measured = measure(same, put_back(after))
        allowed = bound(same, measured)
        if not measured["max_rel"] <= allowed:
            raise VerifyError(
                "the tensors that the folded program exports do not give its outputs back in the "
                f"original model: off by {measured['max_rel']:.3g} of the largest output, allowed "
                f"is {allowed:.3g}. The program is unchanged."
            )
        return {"exported": measured["max_rel"]}

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        for name in self.names or ():
            if name not in program.adapters:
                raise FoldError(
                    f"there is no adapter {name!r}. Adapters: "
                    f"{', '.join(program.adapters) or 'none'}; nearest: "
                    f"{nearest(name, program.adapters)}."
                )
        wanted = program.adapters if self.names is None else self.names
        folded = [a for a in program.attachments if a.adapter in wanted]
        return Plan({"branches": [a.path for a in folded]})

    def apply(self, edit: Editor, plan: Plan) -> None:
        paths = list(plan.decisions["branches"])
        site_of = {a.path: a.site for a in edit.program.attachments}
        trained, untied = trained_tensors(edit.program), set(edit.program.untied)
        result = fold(edit, paths, self.tied, self.lossy)
        keep_trained(edit, trained)
        if result.kept and self.names is not None:
            path, reason = next(iter(result.kept.items()))
            raise FoldError(f"{site_of[path]}: {path} is {reason.removeprefix('is ')}.")
        edit.edited.extend(site_of[path] for path in result.folded)
        edit.skipped.extend((site_of[path], reason) for path, reason in result.kept.items())
        edit.figures["delta_lost"] = result.lost
        if result.gap:
            edit.figures["branch"] = result.gap
        if result.packed:
            edit.figures["delta_left"] = result.left
        notes = dict.fromkeys((*result.packed, *result.vanished))
        edit.notes.extend(f"{site}: {note}" for site, note in notes)
        warn_of(result.vanished)
        for name in sorted({*edit.program.untied} - untied):
            edit.note(
                f"{name} is a tensor of its own now: the original model gives these outputs only "
                "once it is untied there, too (such as tie_word_embeddings=False)"
            )
