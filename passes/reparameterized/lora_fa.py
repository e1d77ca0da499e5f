"""LoRA-FA: `y = x W^T + b + s (drop(x) A^T) B^T` with A drawn once and frozen; B alone trains.

Zhang et al. 2023, arXiv:2308.03303. A and the scale are LoRA's. No gradient of A is needed: forward
keeps `x A^T [..., rank]` for backward in the place of x, and the optimizer has nothing of A. Folds
exactly: `W + s B A`.

With `corrected=true` gradients of B become `G (A A^T)^-1 / s^2` before the optimizer sees them: of
all changes of B, the one whose `s B A` comes nearest to a full step (a later version of the paper;
PEFT's optimizer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.aliases import Alias
from ...rewriter.pipeline.controller import Controller, usual
from ...rewriter.program.sites import WeightSite
from .initial_factors import require_random
from .lora import LoRA, LoRABranch


class LoRAFABranch(LoRABranch):
    """A parameter `b [out, rank]`, and a buffer `a [rank, in]`."""

    a: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__(a, b, scale, dropout)
        del self.a
        self.register_buffer("a", a)


class CorrectedController(Controller):
    """Turns gradients of B into the nearest to full steps, if wanted."""

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        return usual(parameter)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if not cast(LoRAFA, self.method).corrected:
            return
        for _, branch in self.branches():
            if branch.b.grad is not None:
                branch.b.grad = branch.b.grad @ self._inverse(branch)

    def _inverse(self, branch: LoRAFABranch) -> Tensor:
        """`(A A^T)^-1 / s^2 [rank, rank]`, one a matrix."""
        gram = branch.a @ branch.a.mT
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.pinv(gram + 1e-8 * eye, hermitian=True) / branch.scale**2


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """Adds a low-rank branch of which the second factor trains.

    Attributes:
        corrected: rescale the gradients of B to what is nearest to a full step.
        where: the paper adapts all linears of the blocks.
    """

    controller: ClassVar[type[Controller]] = CorrectedController
    named: ClassVar[tuple[str, ...]] = ("conv", "experts")
    aliases: ClassVar[Mapping[str, Alias]] = LoRA.aliases

    corrected: bool = False
    where: str = "q|k|v|o|ffn"

    def check(self) -> None:
        super().check()
        require_random(self)
        remedy = "Choose lora: of two factors, one may learn faster."
        self.require(self.lr_ratio == 1, "lr_ratio", "1, since B alone trains", remedy)
        self.require(self.alpha != 0 or not self.corrected, "alpha", "not 0 with corrected=true")

    def insert(self, edit: Editor, site: WeightSite) -> None:
        made = self.made(edit, site)
        a, b = made.a.detach(), made.b.detach()
        edit.add(site, LoRAFABranch(a, b, made.scale, made.dropout))
