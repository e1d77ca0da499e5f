"""SoRA: `y = x W^T + b + s ((drop(x) A^T) * g) B^T`, its ranks pruned by a sparse gate.

Ding et al., EMNLP 2023, arXiv:2311.11696. A is LoRA's, B zero, so that step 0 is the base model;
the gate `g [rank]` starts N(0, 1). After each step of the optimizer comes the proximal step of
`lambda |g|_1`, with l the learning rate of g:

    g <- sign(g) max(|g| - l lambda, 0)

A gate that is zero may open again. lambda may grow in equal stages (the paper's schedule from
dense to sparse). `s = alpha / rank`, also when fewer ranks are left. `finish()` takes what is zero
out of A and B and multiplies A by g: a LoRA of the ranks that are left. Folds exactly:
`W + s B diag(g) A`.

Of the released code are `threshold=absolute` (lambda alone), `prox=reference` (what is below twice
the threshold is zero, too) and `l1`, a term `l1 sum |g| / (number of gates)` of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import LowRank, Part
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.passes import Pass, Saved
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ..merging.bake import Bake
from .factors import FactorController
from .initial_factors import require_random
from .lora import LoRA, LoRABranch


class SoRABranch(LoRABranch):
    """A LoRA with `g [rank]`, one for all matrices of a stack; ranks with zero g are pruned."""

    axes: ClassVar[Axes] = {**LoRABranch.axes, "g": ("rank",)}

    def __init__(self, g: Tensor, ungated: LoRABranch) -> None:
        super().__init__(ungated.a.detach(), ungated.b.detach(), ungated.scale, ungated.dropout)
        self.g = nn.Parameter(g)

    def acting(self) -> tuple[Tensor, Tensor]:
        return self.a * self.g[:, None], self.b

    def settled(self, **decided: Any) -> LoRABranch | None:
        kept: list[int] = decided["kept"]
        if not kept:
            return None
        a, b = (t.detach() for t in self.acting())
        return LoRABranch(a[..., kept, :], b[..., kept], self.scale, self.dropout)


class ProximalController(FactorController):
    """The proximal step behind each step of the optimizer."""

    def gated(self) -> list[SoRABranch]:
        """The branches that are not settled yet."""
        return [b for _, b in self.branches() if isinstance(b, SoRABranch)]

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        gates, l1 = [b.g for b in self.gated()], cast(SoRA, self.method).l1
        return l1 * torch.cat([*gates]).abs().mean() if gates and l1 else None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        method = cast(SoRA, self.method)
        groups: Any = [] if self.optimizer is None else self.optimizer.param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        strength = method.strength_at(step, self.total_steps)
        for branch in self.gated():
            rate = 1.0 if method.threshold == "absolute" else rates.get(id(branch.g), 0.0)
            cut = float(rate) * strength
            shrunk = F.softshrink(branch.g, cut)
            if method.prox == "reference":
                shrunk = shrunk.masked_fill(branch.g.abs() < 2 * cut, 0.0)
            branch.g.copy_(shrunk)

    def finish(self) -> tuple[Pass, ...]:
        return (Bake(names=(self.adapter,)),) if self.gated() else ()


@dataclass(frozen=True, kw_only=True)
class SoRA(LoRA):
    """Adds low-rank branches whose ranks a gate prunes while they train.

    Attributes:
        strength: lambda; a gate survives whose step by the optimizer is larger in the mean, and
            those of Adam are at most 1 in learning rates.
        strongest: lambda of the last stage; none for one stage.
        stages: equal parts of training, in which lambda grows from the one to the other.
        spacing: of the stages' lambdas.
        threshold: of the proximal step: lambda in learning rates of g, or alone.
        prox: soft thresholding, or what the released code does.
        l1: weight of a term of the loss.
        where: the paper adapts all linears of the blocks.
    """

    controller: ClassVar[type[Controller]] = ProximalController

    strength: float = 0.4
    strongest: float | None = None
    stages: int = 7
    spacing: Literal["linear", "log"] = "linear"
    threshold: Literal["lr_scaled", "absolute"] = "lr_scaled"
    prox: Literal["soft", "reference"] = "soft"
    l1: float = 0.0
    where: str = "q|k|v|o|ffn"

    def check(self) -> None:
        super().check()
        require_random(self)
        for option in ("strength", "l1"):
            self.require(0 <= getattr(self, option) < math.inf, option, "at least 0")
        last, least = self.strongest, self.strength
        grows = last is None or least <= last < math.inf
        self.require(grows, "strongest", f"none, or at least strength={least:g}")
        self.require(self.stages >= 1, "stages", "at least 1")
        fine = self.spacing == "linear" or last is None or least > 0
        self.require(fine, "strength", "above 0 with spacing=log")

    def strength_at(self, step: int, total: int) -> float:
        """lambda after a step, counted from 0."""
        if self.strongest is None or self.stages == 1:
            return self.strength
        share = min(step * self.stages // max(total, 1), self.stages - 1) / (self.stages - 1)
        if self.spacing == "log":
            return self.strength ** (1 - share) * self.strongest**share
        return self.strength + share * (self.strongest - self.strength)

    def scale(self, rank: int) -> float:
        del rank  # pruning changes no scale
        return super().scale(self.rank)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        made = self.made(edit, site)
        g = torch.randn(made.a.shape[-2], generator=edit.generator)
        edit.add(site, SoRABranch(g.to(edit.like(site)), made))

    def saved_part(self, saved: Saved) -> Part | None:
        a, b, g = (saved.tensors.get(name) for name in "abg")
        a = a if a is None or g is None else a * g[:, None]
        return None if a is None or b is None else LowRank(saved.target, a, b, self.scale(0))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        here = ProximalController(program, self).branches()
        gates = {path: b.g.detach() for path, b in here if isinstance(b, SoRABranch)}
        return {path: {"kept": g.nonzero().flatten().tolist()} for path, g in gates.items()}
