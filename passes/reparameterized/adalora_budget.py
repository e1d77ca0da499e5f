"""How AdaLoRA chooses its ranks: importance, budget and pruning after each optimizer step.

The importance of a weight w after a step, from the gradient g of that step (complete, unscaled and
averaged over processes: with a GradScaler, `scaler.unscale_(optimizer)` comes before
`before_step`; data-parallel training averages by itself, and then all processes decide alike):

    I = |w g|,  M <- b1 M + (1 - b1) I,  U <- b2 U + (1 - b2) |I - M|,  S = M U

and that of a rank i is `S(e_i) + mean_j S(P_ji) + mean_j S(Q_ij)`. The budget falls with the cube
of the time that is left. Only e is set to zero: P, Q and the optimizer's state go on.
Zhang et al., ICLR 2023, arXiv:2303.10512, sections 3.2 and 3.3; order of a step as released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...rewriter.errors import PassError
from ...rewriter.program import Program
from ...rewriter.running.controller import Controller, Forward
from ...rewriter.running.passes import Method, Pass
from ..merging.bake import Bake

if TYPE_CHECKING:
    from .adalora import AdaLoRA


class AdaLoRAController(Controller):
    """Scores ranks and prunes them to the budget after each optimizer step.

    Attributes:
        options: the method, with the schedule.
        sensitivity, uncertainty: M and U above, by parameter name.
    """

    def __init__(self, program: Program, method: Method) -> None:
        super().__init__(program, method)
        self.options = cast("AdaLoRA", method)
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def start(self) -> None:
        warmup, final = self.phases()
        if warmup + final >= self.total_steps:
            raise PassError(
                f"{self.method.adapter}: warmup={warmup} and final={final} leave none of "
                f"{self.total_steps} steps to prune in. Make them smaller, or below 1 for shares."
            )

    def phases(self) -> tuple[int, int]:
        """Steps before pruning, and steps after it."""
        given = (self.options.warmup, self.options.final)
        warmup, final = (int(n) if n >= 1 else int(n * self.total_steps) for n in given)
        return warmup, final

    def budget(self, step: int) -> int:
        """How many ranks all sites may have together after a step (counted from 0)."""
        warmup, final = self.phases()
        edited = next(r.edited for r in self.program.history if r.adapter == self.method.adapter)
        first = sum(b.e.numel() for _, b in self.branches())
        last = min(first, self.options.final_rank * len(edited))
        ends = self.total_steps - final
        if step <= warmup:
            return first
        if step >= min(ends, self.total_steps - 1):
            return last
        return int(last + (first - last) * (1 - (step - warmup) / (ends - warmup)) ** 3)

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        gaps = list(self._gaps()) if self.options.gamma else []
        if not gaps:
            return None
        if self.options.orth == "squared_sum":
            return self.options.gamma * torch.stack([g.square().sum() for g in gaps]).sum()
        return self.options.gamma * torch.stack([g.norm() for g in gaps]).mean()

    def _gaps(self) -> Iterator[Tensor]:
        """`P^T P - I` and `Q Q^T - I` of all sites, in at least float32."""
        for _, branch in self.branches():
            for rows in (branch.p.mT, branch.q):
                wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
                yield wide @ wide.mT - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)

    def after_step(self, step: int) -> None:
        ends = self.total_steps - self.phases()[1]
        if step < ends:
            self._score()
        last = step + 1 >= self.total_steps
        if step > ends or last or step % self.options.interval == 0:
            self._prune(self.budget(step))

    def _parameters(self) -> dict[str, Tensor]:
        return {f"{p}.{n}": t for p, b in self.branches() for n, t in b.named_parameters()}

    @torch.no_grad()
    def _score(self) -> None:
        held = self._parameters()
        if held and all(t.grad is None for t in held.values()):
            raise PassError(
                f"{self.method.adapter} scores ranks by gradients, and there are none. Call "
                "controllers.after_step(step) between optimizer.step() and optimizer.zero_grad()."
            )
        beta1, beta2 = self.options.beta1, self.options.beta2
        for name, tensor in held.items():
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            now = (tensor * grad).abs()
            zero = torch.zeros_like(now)
            mean = beta1 * self.sensitivity.get(name, zero) + (1 - beta1) * now
            spread = beta2 * self.uncertainty.get(name, zero) + (1 - beta2) * (now - mean).abs()
            self.sensitivity[name], self.uncertainty[name] = mean, spread

    @torch.no_grad()
    def _prune(self, budget: int) -> None:
        """Leaves the `budget` most important ranks; of equals, the first."""
        branches = list(self.branches())
        if budget >= sum(b.e.numel() for _, b in branches):
            return
        scores = [self.importance(path) for path, _ in branches]
        order = torch.cat(scores).argsort(descending=True, stable=True)
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept[order[:budget]] = True
        for (_, branch), keep in zip(branches, kept.split([len(s) for s in scores]), strict=True):
            branch.e.masked_fill_(~keep, 0.0)

    def importance(self, path: str) -> Tensor:
        """Scores `[rank]` of the ranks of one branch."""
        if f"{path}.e" not in self.sensitivity:
            raise PassError(
                f"{self.method.adapter} has no scores of {path}. To go on in the middle, load what "
                "controllers.state_dict() gave."
            )
        p, e, q = (self.sensitivity[f"{path}.{n}"] * self.uncertainty[f"{path}.{n}"] for n in "peq")
        return e + p.mean(0) + q.mean(1)

    def finish(self) -> tuple[Pass, ...]:
        pruned = self.method.settle(self.program, None, {})
        return (Bake(names=(self.method.adapter,)),) if pruned else ()

    def state_dict(self) -> dict[str, Any]:
        return {"sensitivity": dict(self.sensitivity), "uncertainty": dict(self.uncertainty)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        held, given = self._parameters(), (state["sensitivity"], state["uncertainty"])
        shapes = {n: t.shape for n, t in held.items()}
        if any(g and {n: t.shape for n, t in g.items()} != shapes for g in given):
            raise PassError(f"{self.method.adapter}: the state is of other branches or ranks.")
        self.sensitivity, self.uncertainty = (
            {n: t.detach().to(held[n].device, copy=True) for n, t in g.items()} for g in given
        )
