"""SPT: a budget is spent where the loss is most sensitive, entry by entry or on modules.

He et al., ICCV 2023, arXiv:2303.08566 (sensitivity-aware parameter-efficient fine-tuning). One pass
over batches gives each entry of the selected tensors its sensitivity, the sum over batches of g^2,
to first order what a step of gradient descent gains there. The most sensitive of all entries are
taken in order. Where a matrix has as many of them as `1 / alpha` of what a module beside it costs,
it gets the module in their place (structured tuning), and a vector with `1 / beta` of its entries
trains whole; until the budget is spent.

    entries   W' = W + scatter(values)             a vector, zero at first
    lora      y = x W^T + b + (drop(x) A^T) B^T    A Kaiming, B zero, no scale
    adapter   y = z + U gelu(D z + b_D) + b_U      of z = x W^T + b; D Kaiming, the others zero

Step 0 is the base model. The plan keeps the modules' places and an index for each entry, so
replaying needs no data. Entries and LoRA fold exactly, adapters do not.

    peftfx.run(program, "spt{budget=200000}", data=batches)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.edits.read import Reading
from ...rewriter.parts.parts import LowRank
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Saved
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State
from ...rewriter.scores.cost import Unit
from ...rewriter.scores.entries import (
    entry_scores,
    planned,
    scored_parts,
    spend,
    stored_index,
    train_planned,
)
from ..reparameterized.lora import LoRABranch
from .structured import module_at, modules_of


@dataclass(frozen=True, kw_only=True)
class SPT(Method):
    """Spends a budget on the most sensitive entries, or on modules where they are many.

    Attributes:
        budget: what may train, in `unit`; below 1, a share of what all selected entries cost.
        unit: `parameters`; `bytes` of tensors, an entry's index included; `flops` of modules for
            128 tokens, an entry counting one; or `latency`, measured seconds of a forward.
        form: the module beside matrices, or none.
        rank: of the module.
        dropout: probability on the input of a LoRA, in training.
        alpha: a matrix whose entries have cost `1 / alpha` of the module's cost gets the module.
        beta: a bias or norm with `1 / beta` of its entries taken trains whole.
        score: `squared` (see above), or `magnitude` of the weights, which needs no batches.
        bias: also the biases.
        where: linears, norms, convolutions, experts or embeddings; modules stand beside linears.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "conv", "norm", "embedding")
    folds: ClassVar[str] = "exactly"

    budget: float = 0.005
    unit: Unit = "parameters"
    form: Literal["lora", "adapter"] | None = "lora"
    rank: int = 8
    dropout: float = 0.1
    alpha: float = 10.0
    beta: float = 5.0
    score: Literal["squared", "magnitude"] = "squared"
    bias: bool = True
    where: str = "linear and not head|norm"

    def check(self) -> None:
        self.require(0 < self.budget < math.inf, "budget", "positive")
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        for option in ("alpha", "beta"):
            self.require(1 <= getattr(self, option) < math.inf, option, "at least 1")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        decided = super().plan(program, data, sources).decisions
        parts, left = scored_parts(program, self.sites(program), self.bias, self.score)
        look = Reading(program)
        places = [place for part in parts for place in modules_of(self, look, part)]
        whole = sum(p.part.count * p.entry for p in places)
        budget = self.budget * whole if self.budget < 1 else self.budget
        scores = entry_scores(program, [p.name for p in parts], self.score, data)
        spent = spend(places, scores, budget)
        indices: dict[str, list[Tensor]] = {}
        full = ((p, torch.arange(p.part.count)) for p in spent.forms if p.form == "whole")
        for place, index in (*spent.entries, *full):
            indices.setdefault(place.part.name, []).append(stored_index(place.part, index))
        modules = [p.part for p in spent.forms if p.form != "whole"]
        kept = [p for p in parts if p.name not in {m.name for m in modules}]
        about = {"modules": [m.site.id for m in modules], "budget": budget, "spent": spent.cost}
        chosen = {n: torch.cat(i) for n, i in indices.items()}
        return planned({**decided, **about}, kept, chosen, left)

    def insert_all(self, edit: Editor, sites: Sequence[Site], plan: Plan) -> None:
        for name in plan.decisions["modules"]:
            site: Any = edit.program.sites[name]
            module, like = module_at(self, site, edit.generator), edit.like(site)
            module.to(like.device, like.dtype)
            edit.add(site, module) if isinstance(module, LoRABranch) else edit.shift(site, module)
        train_planned(edit, sites, self.bias, plan)
        edit.figures["spent"] = plan.decisions["spent"]

    def saved_part(self, saved: Saved) -> LowRank | None:
        tensors = saved.tensors
        return LowRank(saved.target, tensors["a"], tensors["b"], 1.0) if "a" in tensors else None
