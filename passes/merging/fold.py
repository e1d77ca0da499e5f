"""Fold: turn trained branches into constants of the base weights, and drop them.

Peephole rules run to a fixpoint from the inside out (`rewriter/edits/folding/fold.py`). What cannot
be folded stays in the graph and is reported with the reason. Merging runs in float64 with
one rounding. The certificate says what that did: `delta_lost` is the largest rounding error of one
weight, relative to its change (it may be large where errors of many elements cancel), and
`outputs_kept` how much is left of what all branches together add to the outputs. The record has the
share that survives at each site. Where that is too little, `mode=keep` leaves the branches, and
`mode=residual` folds only what a branch of low rank beside the weight does not carry.
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
from ...rewriter.pipeline.passes import NAME, Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ...rewriter.run.before_fold import keep_trained, trained_tensors
from ...rewriter.verify.verify import bound, is_meta, measure
from ...rewriter.weights.exported import put_back
from ..reparameterized.lora import LoRABranch


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
        mode: `fold`; `keep` leaves the branches of a site where less than `least` of their change
            would survive rounding; `residual` leaves a branch of `rank` beside each weight, with
            the largest singular values of the change, and folds the rest. Rounding errors have no
            low rank, so nothing catches them later; a change of at most this rank loses nothing.
        least: the share that has to survive, 1 less `delta_lost` of the site.
        rank: of the branches that `residual` leaves; at smaller weights that of the weight.
        name: of the adapter that these are; they are trained and saved like any LoRA.
    """

    contract: ClassVar[Contract] = Contract("bounded")
    rewrites: ClassVar[bool] = True
    sharded: ClassVar[bool] = True

    names: tuple[str, ...] | None = None
    tied: Literal["refuse", "keep", "untie", "both"] = "refuse"

    lossy: bool = False
    mode: Literal["fold", "keep", "residual"] = "fold"
    least: float = 0.5
    rank: int = 8
    name: str = "residual"

    @property
    def adapter(self) -> str | None:
        return self.name if self.mode == "residual" else None

    def check(self) -> None:
        self.require(0 < self.least <= 1, "least", "above 0 and at most 1")
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(bool(NAME.fullmatch(self.name)), "name", "letters, digits, _ and -")

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
        if self.mode == "residual" and not folded:
            raise FoldError(
                "no adapter has a branch to fold, so nothing would stay beside a weight. Leave "
                "mode=residual out."
            )
        return Plan({"branches": [a.path for a in folded]})

    def apply(self, edit: Editor, plan: Plan) -> None:
        paths = list(plan.decisions["branches"])
        site_of = {a.path: a.site for a in edit.program.attachments}
        trained, untied = trained_tensors(edit.program), set(edit.program.untied)
        least, rank = self.least * (self.mode == "keep"), self.rank * (self.mode == "residual")
        result = fold(edit, paths, self.tied, self.lossy, least=least, rank=rank)
        keep_trained(edit, trained)
        for site_id, (b, a) in result.parts.items():
            site = edit.program.sites[site_id]
            if isinstance(site, WeightSite):
                like = edit.like(site)
                edit.add(site, LoRABranch(a.to(like), b.to(like), 1.0, 0.0))
        forced = [(p, why) for p, why in result.kept.items() if p not in result.spared]
        if forced and self.names is not None:
            path, reason = forced[0]
            raise FoldError(f"{site_of[path]}: {path} is {reason.removeprefix('is ')}.")
        edit.edited.extend(site_of[path] for path in result.folded)
        edit.skipped.extend((site_of[path], reason) for path, reason in result.kept.items())
        edit.figures["delta_lost"] = result.lost
        shares = {site: [v.left, v.lost] for site, v in result.shares.items()}
        edit.decided["shares"] = shares
        if result.gap:
            edit.figures["branch"] = result.gap
        if result.packed:
            edit.figures["delta_left"] = result.left
        notes = dict.fromkeys((*result.packed.items(), *result.vanished))
        edit.notes.extend(f"{site}: {note}" for site, note in notes)
        warn_of(result.vanished)
        for name in sorted({*edit.program.untied} - untied):
            edit.note(
                f"{name} is a tensor of its own now: the original model gives these outputs only "
                "once it is untied there, too (such as tie_word_embeddings=False)"
            )
