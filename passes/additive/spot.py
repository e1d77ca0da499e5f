"""SPoT: a soft prompt that starts as those of other tasks, `P <- sum_i a_i P_i` of the nearest k.

Vu et al., ACL 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer",
arXiv:2110.07904. Prompts of source tasks, saved by `peftfx.save`, are given as sources. The generic
form takes one of them, or the mean of all. The targeted form looks for the tasks that are nearest:
with `target=i`, source number i is the target task's own prompt, taken early in its training (its
task embedding), and with e the mean of a prompt's tokens (`similarity=mean`), or every token of one
with every one of the other (`similarity=pairs`, the mean),

    s_i = cos(e_i, e_target),    a_i = s_i / sum_j s_j    over the `top` sources of largest s

Su et al., NAACL 2022, "On Transferability of Prompt Tuning", arXiv:2111.06719, compare tasks by the
neurons that their prompts activate instead (`similarity=neurons`): each prompt runs in front of the
first batch of the data (a start token alone, in the paper), a neuron of a feed-forward block counts
as on where its pre-activation at the first token is above zero, and s_i is the cosine of the two
vectors of what is on, over all layers. After that it is prompt tuning. Which sources were taken is
in the record, and what they gave in the plan, so that replaying needs none of them. Not foldable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.prompts.tokens import Halves, entrances, separate
from ...rewriter.errors import PassError
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import EmbeddingSite, Site
from ...rewriter.program.state import State
from ...rewriter.storage.composed import adapters_of
from .prompt_tasks import activated, prompt_of, similarity
from .prompt_tuning import PromptBranch


@dataclass(frozen=True, kw_only=True)
class SPoT(Method):
    """Prepends a prompt that starts as those of the sources.

    Attributes:
        target: which source is the target task's own early prompt, from 0; none: generic.
        top: how many of the nearest sources to average; 1 takes the nearest.
        similarity: `mean`, `pairs`, or `neurons` (which needs data).
        halves: see `prompt_tuning`.
    """

    folds: ClassVar[str] = "no: they are inputs"

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")
    sourced: ClassVar[bool] = True

    target: int | None = None
    top: int = 1
    similarity: Literal["mean", "pairs", "neurons"] = "mean"
    halves: Halves = "encoder"
    where: str = "embedding.token"

    def check(self) -> None:
        self.require(self.top >= 1, "top", "at least 1")
        self.require(self.target is None or self.target >= 0, "target", "none, or counted from 0")

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        sites = sites if self.placed else entrances(program, sites, self.halves)
        separate(program, sites)
        return sites

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        plan = super().plan(program, data, sources)
        named = [(f"{n} {s.name}", prompt_of(s.tensors, s.name))
                 for n, s in enumerate(adapters_of(program, sources))]  # fmt: skip
        if not named:
            raise PassError(
                "spot starts from prompts of other tasks, and none is given. Give saved ones: "
                "run(program, 'spot', sources=['first/', 'second/'])."
            )
        site: Any = program.sites[plan.decisions["sites"][0]]
        weights = self._weights(named, program, site, data)
        chosen = [(prompt, weights[name]) for name, prompt in named if weights.get(name)]
        sizes = {tuple(prompt.shape) for prompt, _ in chosen}
        if len(sizes) > 1:
            raise PassError(
                f"the prompts are of different sizes: {sorted(sizes)}. Choose one length, or top=1."
            )
        if (own := chosen[0][0].shape[1]) != site.width:
            raise PassError(
                f"the sources' prompts are {own} wide, and {site.id} is {site.width}. Choose "
                "another embedding with where=, or give prompts of this one."
            )
        start = sum((prompt.double() * weight for prompt, weight in chosen), torch.zeros(()))
        decisions = {**plan.decisions, "weights": weights}
        return Plan(decisions, {"prompt": start.to(chosen[0][0].dtype)})

    def _weights(
        self, named: Sequence[tuple[str, Tensor]], program: State, site: EmbeddingSite, data: Any
    ) -> dict[str, float]:
        """What each source counts, by its number and name; they sum to 1."""
        if self.target is None:
            return {name: 1 / len(named) for name, _ in named}
        others = [n for k, (n, _) in enumerate(named) if k != self.target]
        if self.target >= len(named) or self.top > len(others):
            raise PassError(
                f"target={self.target} and top={self.top} need more sources than {len(named)}: the "
                "target's own prompt, and as many others as are averaged. Give more sources."
            )
        near = self._near(dict(named), named[self.target][0], program, site, data)
        best = sorted(near, key=near.__getitem__, reverse=True)[: self.top]
        total = sum(near[n] for n in best)
        if min(near[n] for n in best) <= 0 < self.top - 1:
            raise PassError(
                f"of the {self.top} nearest sources, some are no nearer than by chance: "
                f"{ {n: round(near[n], 4) for n in best} }. Choose a smaller top=."
            )
        return {n: near[n] / total if self.top > 1 else 1.0 for n in best}

    def _near(
        self,
        prompts: Mapping[str, Tensor],
        target: str,
        program: State,
        site: EmbeddingSite,
        data: Any,
    ) -> dict[str, float]:
        """How near the target each other task is."""
        others = [n for n in prompts if n != target]
        if self.similarity != "neurons":
            return {n: similarity(prompts[n], prompts[target], self.similarity) for n in others}
        batch = None if data is None else next(iter(data), None)
        if batch is None:
            raise PassError(
                "similarity=neurons runs each prompt in front of a batch, and none is given. Give "
                "one: run(program, 'spot{...}', data=[batch], sources=[...])."
            )
        on = {n: activated(program, site, prompt, batch) for n, prompt in prompts.items()}
        return {n: float(F.cosine_similarity(on[n], on[target], 0)) for n in others}

    def insert(self, edit: Editor, site: EmbeddingSite) -> None:
        shares = edit.decided["weights"].items()
        edit.note("starts from " + ", ".join(f"{share:.3g} of source {n}" for n, share in shares))
        start = edit.tensors["prompt"].to(edit.like(site), copy=True)
        edit.prepend_tokens(site, PromptBranch(start))
