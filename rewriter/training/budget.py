"""Pruning to a budget while training: what matters, how much may stay, and what stays.

The importance of a weight w, from the gradient g of a step (complete, unscaled and averaged over
processes; data-parallel training averages by itself, and then all processes decide alike):

    I = |w g|,  M <- b1 M + (1 - b1) I,  U <- b2 U + (1 - b2) |I - M|,  S = M U

Zhang et al., ICML 2022, arXiv:2206.12562 (PLATON); the cubic budget is that of Zhu and Gupta 2017,
arXiv:1710.01878.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..errors import PassError
from ..pipeline.aliases import PLACES, Alias, renamed, started_by
from ..pipeline.controller import Controller
from ..pipeline.method import Method
from ..program.state import State
from ..scores.allocate import most


@dataclass(frozen=True)
class CubicBudget:
    """Falls from `first` to `last` with the cube of the time that is left.

    Attributes:
        first, last: how many parts may stay before and after pruning.
        warmup: steps before pruning.
        ends: the step from which on `last` stay.
        total: all steps; after the last one, `last` stay in any case.
    """

    first: int
    last: int
    warmup: int
    ends: int
    total: int

    def __call__(self, step: int) -> int:
        """How many parts may stay after a step, counted from 0."""
        if step <= self.warmup:
            return self.first
        if step >= min(self.ends, self.total - 1):
            return self.last
        left = 1 - (step - self.warmup) / (self.ends - self.warmup)
        return int(self.last + (self.first - self.last) * left**3)


class Sensitivity:
    """Smoothed importance of every entry of some parameters, by their names.

    Attributes:
        mean, spread: M and U above.
    """

    def __init__(self, adapter: str, beta1: float, beta2: float) -> None:
        self.adapter, self.beta1, self.beta2 = adapter, beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in the gradients of one step; a parameter without one counts as unimportant.

        Raises:
            PassError: there are no gradients at all.
        """
        if parameters and all(t.grad is None for t in parameters.values()):
            raise PassError(
                f"{self.adapter} scores its parts by gradients, and there are none. Call "
                "controllers.after_step(step) between optimizer.step() and optimizer.zero_grad()."
            )
        for name, tensor in parameters.items():
            now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
            zero = torch.zeros_like(now)
            mean = self.beta1 * self.mean.get(name, zero) + (1 - self.beta1) * now
            spread = (
                self.beta2 * self.spread.get(name, zero) + (1 - self.beta2) * (now - mean).abs()
            )
            self.mean[name], self.spread[name] = mean, spread

    def score(self, name: str) -> Tensor:
        """S of a parameter.

        Raises:
            PassError: it was never updated.
        """
        if name not in self.mean:
            raise PassError(
                f"{self.adapter} has no scores of {name}. To go on in the middle, load what "
                "controllers.state_dict() gave."
            )
        return self.mean[name] * self.spread[name]

    def state_dict(self) -> dict[str, Any]:
        """What continuing needs."""
        return {"sensitivity": dict(self.mean), "uncertainty": dict(self.spread)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave, for `parameters`.

        Raises:
            PassError: it is of other parameters.
        """
        given, shapes = (state["sensitivity"], state["uncertainty"]), _shapes(parameters)
        if any(g and _shapes(g) != shapes for g in given):
            raise PassError(f"{self.adapter}: the state is of other branches or ranks.")
        self.mean, self.spread = (
            {n: t.detach().to(parameters[n].device, copy=True) for n, t in g.items()} for g in given
        )


@dataclass(frozen=True, kw_only=True)
class Budgeted(Method, abstract=True):
    """A method whose branches have parts that training prunes to a common budget.

    Attributes:
        warmup, final: steps before and after pruning; below 1, a share of all steps.
        interval: steps between two prunings (after pruning, and at the last step, every step).
        beta1, beta2: of the moving averages of importance and of its uncertainty.
    """

    aliases: ClassVar[dict[str, Alias]] = {
        **PLACES,
        **renamed(tinit="warmup", tfinal="final", deltaT="interval", lora_alpha="alpha"),
        "total_step": lambda value: {},  # whoever trains says it
        "init_lora_weights": started_by(),
    }

    warmup: float = 0.1
    final: float = 0.3
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    @property
    def left(self) -> int:
        """How many parts are left at the end, at a site on average."""
        raise NotImplementedError

    def check(self) -> None:
        self.require(self.interval >= 1, "interval", "at least 1")
        for option in ("beta1", "beta2"):
            self.require(0 <= getattr(self, option) < 1, option, "in [0, 1)")
        for option in ("warmup", "final"):
            share = getattr(self, option)
            whole = share < 1 or share == int(share)
            self.require(share >= 0 and whole, option, "a whole number, or a share below 1")


class BudgetController(Controller):
    """Scores the parts of all branches and prunes them to the budget after each optimizer step.

    With a GradScaler, `scaler.unscale_(optimizer)` comes before `before_step`.
    """

    budget: CubicBudget

    def __init__(self, program: State, method: Method) -> None:
        super().__init__(program, method)
        self.options = cast(Budgeted, method)
        self.sensitivity = Sensitivity(method.adapter, self.options.beta1, self.options.beta2)

    def parts(self, branch: Any) -> int:
        """How many parts a branch has."""
        raise NotImplementedError

    def importance(self, path: str) -> Tensor:
        """The scores of the parts of the branch at a path, a vector."""
        raise NotImplementedError

    def keep(self, branch: Any, kept: Tensor) -> None:
        """Switches the parts off that are not kept, without making the branch smaller."""
        raise NotImplementedError

    def start(self) -> None:
        given = self.options.warmup, self.options.final
        warmup, final = (int(n) if n >= 1 else int(n * self.total_steps) for n in given)
        if warmup + final >= self.total_steps:
            raise PassError(
                f"{self.adapter}: warmup={warmup} and final={final} leave none of "
                f"{self.total_steps} steps to prune in. Make them smaller, or below 1 for shares."
            )
        record = next(r for r in self.program.history if r.adapter == self.adapter)
        first = sum(self.parts(branch) for _, branch in self.branches())
        last = min(first, sum(self.options.at_site(record.plan, i).left for i in self.edited()))
        ends = self.total_steps - final
        self.budget = CubicBudget(first, last, warmup, ends, self.total_steps)

    def after_step(self, step: int) -> None:
        if step < self.budget.ends:
            self.sensitivity.update(self._parameters())
        due = step > self.budget.ends or step + 1 >= self.total_steps
        if due or step % self.options.interval == 0:
            self._prune(self.budget(step))

    @torch.no_grad()
    def _prune(self, budget: int) -> None:
        if budget >= self.budget.first:
            return
        masks = most([self.importance(path) for path, _ in self.branches()], budget)
        for (_, branch), kept in zip(self.branches(), masks, strict=True):
            self.keep(branch, kept)

    def _parameters(self) -> dict[str, Tensor]:
        return {f"{p}.{n}": t for p, b in self.branches() for n, t in b.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return self.sensitivity.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sensitivity.load_state_dict(state, self._parameters())


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
