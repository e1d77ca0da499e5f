"""DyLoRA: `y = x W^T + b + alpha / n (drop(x) A_n^T) B_n^T`, each forward with the first n ranks.

Valipour et al., EACL 2023, arXiv:2210.07558. In training n is drawn from 1 to rank for all sites
together, so that the ranks of one training are nested: the first n of them are a LoRA of rank n.
Evaluation and folding take all of them; `bake{rank=4}` leaves the first four. With `frozen=true`
the ranks below n act, and rank n alone learns (the paper's faster form, and the released one).
Starts as LoRA does, so step 0 is the base model; `rslora` divides by sqrt(n).

What does not learn in a step stays as it is: neither moments nor weight decay move it
(`rewriter/training/held.py`). Folds exactly: `W + alpha / rank B A`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import OptionError
from ...rewriter.pipeline.aliases import Alias
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ...rewriter.training.held import Held
from .factors import FactorController
from .initial_factors import require_random
from .lora import LoRA, LoRABranch


class DyLoRABranch(LoRABranch):
    """A LoRA with `drawn []`, how many ranks act in a step; 0 between steps: all act and learn.
    The scale of n ranks falls by `n^-power`.
    """

    drawn: Tensor

    def __init__(self, full: LoRABranch, power: float, frozen: bool) -> None:
        super().__init__(full.a.detach(), full.b.detach(), full.scale, full.dropout)
        self.power, self.frozen = power, frozen
        self.register_buffer("drawn", full.a.new_zeros((), dtype=torch.int64), persistent=False)

    def learning(self, drawn: Tensor) -> Tensor:
        """Which ranks learn, `[rank]`."""
        order = torch.arange(1, self.a.shape[-2] + 1, device=drawn.device)
        now = drawn.clamp(max=self.a.shape[-2])
        return (order == now if self.frozen else order <= now) | (now == 0)

    def lasting(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def acting(self) -> tuple[Tensor, Tensor]:
        """The drawn scale is in A, with zero for ranks that do not act; in evaluation mode, too,
        in which some train."""
        rank = self.a.shape[-2]
        now = torch.where(self.drawn == 0, rank, self.drawn.clamp(max=rank))
        acts = torch.arange(rank, device=now.device) < now
        a = self.a * (acts * (rank / now) ** self.power).to(self.a.dtype)[:, None]
        if not self.frozen:
            return a, self.b
        learns = self.learning(self.drawn)
        b = torch.where(learns, self.b, self.b.detach())
        return torch.where(learns[:, None], a, a.detach()), b

    def settled(self, **decided: Any) -> LoRABranch:
        rank = self.a.shape[-2]
        left = min(decided["rank"], rank)
        a, b = self.a.detach()[..., :left, :].clone(), self.b.detach()[..., :left].clone()
        return LoRABranch(a, b, self.scale * (rank / left) ** self.power, self.dropout)


class DrawController(FactorController):
    """Draws how many ranks act, before each forward."""

    def __init__(self, program: State, method: Method) -> None:
        super().__init__(program, method)
        self.generator = torch.Generator().manual_seed(method.random_seed)
        self.drawn: list[int] = []
        self.held = Held(None, [])

    def nested(self) -> list[DyLoRABranch]:
        """The branches that are not cut yet."""
        return [b for _, b in self.branches() if isinstance(b, DyLoRABranch)]

    def begin_forward(self, batch: Any) -> None:
        most = max((b.a.shape[-2] for b in self.nested()), default=0)
        if not most:
            return
        self.drawn.append(int(torch.randint(1, most + 1, (), generator=self.generator)))
        for branch in self.nested():
            branch.drawn.fill_(self.drawn[-1])

    def before_step(self, step: int) -> None:
        masks: list[tuple[nn.Parameter, Tensor]] = []
        for branch in self.nested() if self.drawn else ():
            learns = [branch.learning(branch.drawn.new_tensor(n)) for n in self.drawn]
            still = ~torch.stack(learns).any(0)  # in no forward of this step
            masks += [(branch.a, still[:, None]), (branch.b, still)]
        self.held = Held(self.optimizer, masks)
        self.drawn.clear()

    def after_step(self, step: int) -> None:
        self.held.put_back()
        for branch in self.nested():
            branch.drawn.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LoRA):
    """Adds low-rank branches that are trained for all ranks at once.

    Attributes:
        rank: the largest; with one for each site, those with a smaller one draw up to that.
        frozen: of the ranks that act in a step, the last one alone learns.
        one_scale: alpha / rank for every n: what the first ranks add does not depend on n then, and
            cuts come closer to LoRAs that were trained at their rank.
    """

    controller: ClassVar[type[Controller]] = DrawController
    nested: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, Alias]] = LoRA.aliases

    frozen: bool = False
    one_scale: bool = False

    def check(self) -> None:
        super().check()
        require_random(self)

    def scale(self, rank: int) -> float:
        return self.alpha / (self.rank if self.one_scale else rank) ** (0.5 if self.rslora else 1.0)

    def insert(self, edit: Editor, site: WeightSite) -> None:
        power = 0.0 if self.one_scale else 0.5 if self.rslora else 1.0
        edit.add(site, DyLoRABranch(self.made(edit, site), power, self.frozen))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        here = DrawController(program, self).branches()
        nested = {path: b for path, b in here if isinstance(b, DyLoRABranch)}
        rank = inputs.get("rank")
        if not nested or rank is None:
            return {}
        most = max(b.a.shape[-2] for b in nested.values())
        if not 1 <= rank <= most:
            raise OptionError(
                f"bake: rank={rank}, but {self.adapter} has ranks 1 to {most}. Choose one of them."
            )
        return {path: {"rank": rank} for path in nested}
