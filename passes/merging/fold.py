"""Fold: turn trained branches into constants of the base weights, and drop them.

Peephole rules run to a fixpoint from the inside out (`rewriter/edits/fold.py`). What cannot be
folded stays in the graph and is reported with the reason. Merging runs in at least float32 with
one rounding; the certificate says how much of a delta the rounding lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.fold import fold
from ...rewriter.errors import FoldError, nearest
from ...rewriter.program import Attachment, Program
from ...rewriter.running.passes import Pass, Plan
from ...rewriter.running.verify import Contract
from ...rewriter.sharded import has_shards
from ...rewriter.storage.artifact import require_finite


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Folds adapters into the base weights.

    Attributes:
        names: which adapters; all by default. A named adapter that cannot be folded is an error.
        tied: at weights tied to an embedding: refuse, keep (the branch), untie or both (change
            the shared tensor, so outputs change; by how much is measured and not limited).
    """

    contract: ClassVar[Contract] = Contract("bounded")
    sharded: ClassVar[bool] = True

    names: tuple[str, ...] | None = None
    tied: Literal["refuse", "keep", "untie", "both"] = "refuse"

    def promise(self) -> Contract:
        return Contract("trainable") if self.tied == "both" else self.contract

    def plan(self, program: Program, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        for name in self.names or ():
            if name not in program.adapters:
                raise FoldError(
                    f"there is no adapter {name!r}. Adapters: "
                    f"{', '.join(program.adapters) or 'none'}; nearest: "
                    f"{nearest(name, program.adapters)}."
                )
        wanted = program.adapters if self.names is None else self.names
        folded = [a for a in program.attachments if a.adapter in wanted]
        _require_finite(program, folded)
        return Plan({"branches": [a.path for a in folded]})

    def apply(self, edit: Editor, plan: Plan) -> None:
        paths = list(plan.decisions["branches"])
        site_of = {a.path: a.site for a in edit.program.attachments}
        result = fold(edit, paths, self.tied)
        if result.kept and self.names is not None:
            path, reason = next(iter(result.kept.items()))
            raise FoldError(f"{site_of[path]}: {path} is {reason.removeprefix('is ')}.")
        edit.edited.extend(site_of[path] for path in result.folded)
        edit.skipped.extend((site_of[path], reason) for path, reason in result.kept.items())
        edit.figures["delta_lost"] = result.lost


def _require_finite(program: Program, attachments: Sequence[Attachment]) -> None:
    """Raises NonFiniteError where a branch, or a weight that it folds into, is not finite."""
    if has_shards(program.module):
        return  # what is made of them is checked, on all ranks together
    stored = dict(program.module.named_parameters())
    held = {f"{a.path}.{n}": t for a in attachments
            for n, t in program.branch(a).state_dict(keep_vars=True).items()}  # fmt: skip
    weights = {getattr(program.sites[a.site], "weight", "") for a in attachments}
    held |= {name: stored[name] for name in sorted(weights & stored.keys())}
    for name, tensor in held.items():
        if not tensor.is_meta:
            require_finite(name, tensor, "Nothing was folded: leave it out with fold{names=[...]}.")
