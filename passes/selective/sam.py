"""SAM: trains the entries that second-order theory says lower the loss most, chosen once.

Fu et al., AAAI 2023, arXiv:2211.15583 (second-order approximation method). Among all masks M of p
entries, with a diagonal H, the loss

    L(theta + M d) ~ L + g^T M d + (M d)^T H (M d) / 2,   at its least L - sum_{i in M} g_i^2 / 2H_i

falls most for the p largest g_i^2 / H_i. Over the batches b of a score pass, in evaluation mode and
without a step,

    gradient    (sum_b g_b)^2                  H is constant, as released
    squared     sum_b g_b^2                    the diagonal of the empirical Fisher matrix
    newton      (sum_b g_b)^2 / sum_b g_b^2    H is that diagonal
    magnitude   |theta|                        needs no batches
    change      |theta_tuned - theta|          of a program that was trained whole (`sources=`), as
                                               Ansell et al., ACL 2022, arXiv:2110.07560

The chosen entries then train as a vector, `theta' = theta + scatter(values)`, which starts at zero
and is all that an optimiser sees: no moment and no weight decay reaches another entry. An artifact
holds an int32 index and a value each; replaying it needs no data. Folds exactly.

    peftfx.run(program, "sam{density=0.005}", data=batches)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.linear.sparse import Part
from ...rewriter.errors import OptionError
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.scores.allocate import largest
from ...rewriter.scores.entries import (
    entry_scores,
    planned,
    scored_parts,
    stored_index,
    train_planned,
)


@dataclass(frozen=True, kw_only=True)
class SAM(Method):
    """Trains the entries of stored tensors with the largest scores.

    Attributes:
        density: the share of entries that train.
        score: see above; the first three need batches with a loss (`data=`).
        scope: so many of each stored tensor that has a score, at least one, as released
            (`tensor`), or of all selected together (`all`).
        bias: also the biases of linears, convolutions and norms.
        where: linears, experts, convolutions, norms or embeddings.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "conv", "norm", "embedding")
    folds: ClassVar[str] = "exactly"

    density: float = 0.005
    score: Literal["gradient", "squared", "newton", "magnitude", "change"] = "gradient"
    scope: Literal["tensor", "all"] = "tensor"
    bias: bool = True
    where: str = "linear and not head|conv|experts|norm"

    def check(self) -> None:
        self.require(0 < self.density <= 1, "density", "in (0, 1]")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        decided = super().plan(program, data, sources).decisions
        scored, left = scored_parts(program, self.sites(program), self.bias, self.score)
        parts = {p.name: p for p in scored}
        tuned = sources[0] if len(sources) == 1 else None
        scores = entry_scores(program, list(parts), self.score, data, tuned)
        chosen = self._chosen(parts, scores)
        indices = {n: stored_index(parts[n], index) for n, index in chosen.items()}
        return planned(decided, scored, indices, left)

    def _chosen(
        self, parts: dict[str, Part], scores: Iterable[tuple[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Flat indices into each part."""
        own = ((name, parts[name].own(score)) for name, score in scores)
        if self.scope == "tensor":
            counts = {n: max(1, round(self.density * p.count)) for n, p in parts.items()}
            return {n: largest([(n, s)], counts[n])[n] for n, s in own if bool(s.any())}
        every = sum(p.count for p in parts.values())
        count = round(self.density * every)
        if not count:
            raise OptionError(
                f"sam: density={self.density:g} of {every:,} entries is less than one. Choose at "
                f"least {1 / max(1, every):.1g}, or more places with where=."
            )
        return largest(own, count)

    def insert_all(self, edit: Editor, sites: Sequence[Site], plan: Plan) -> None:
        train_planned(edit, sites, self.bias, plan)
