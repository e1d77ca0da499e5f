"""MerA: bottleneck adapters merged once their inner units are aligned by optimal transport.

He et al. 2023, arXiv:2308.15982, by the alignment of Singh and Jaggi, NeurIPS 2020,
arXiv:1910.05653. The r inner units of an adapter may lie in any order, so those of each member are
carried to those of the first. With the cost C between units and uniform marginals,

    T = argmin <C, T>,    D <- (r T)^T D,    b_D <- (r T)^T b_D,    U <- U (r T)

and the merged adapter is the mean of the aligned ones; inputs and outputs are the model's and need
no transport. C is the squared distance of the units' weights `[D_i; U_:i]` (`cost=weights`), or of
what the units give for the tokens of batches (`cost=activations`), each member run on the base
alone:

    program = peftfx.run(program, "mera{cost=activations}", data=batches)

The exact plan of `solver=emd` is a permutation; `sinkhorn` is smoothed by an entropy of weight
`regularisation` times the largest cost. The transport is POT's (`pip install POT`), and its
marginals are checked. Adapters of tasks of one kind merge best, and train on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...rewriter.errors import OptionError, PassError
from ...rewriter.program.history import Plan
from ...rewriter.program.state import BRANCHES, State
from ...rewriter.scores.observe import operand_rows
from ...rewriter.storage.composed import Source
from .averaged import Averaged, Values, alone, mean

_OFF = 1e-6
"""By how much the sums of a plan may be off, as a share."""


@dataclass(frozen=True, kw_only=True)
class MerA(Averaged):
    """Merges bottleneck adapters that are alike, unit by unit.

    Attributes:
        cost: what tells units apart: their `weights`, or `activations` on data.
        solver: `emd` (exact) or `sinkhorn`.
        regularisation: of `sinkhorn`, as a share of the largest cost.
    """

    cost: Literal["weights", "activations"] = "weights"
    solver: Literal["emd", "sinkhorn"] = "emd"
    regularisation: float = 0.01

    def check(self) -> None:
        super().check()
        self.require(0 < self.regularisation < 1, "regularisation", "in (0, 1)")

    def merged(self, program: State, members: Mapping[str, Source], data: Any) -> Plan:
        held = {n: m.tensors for n, m in members.items()}
        first, *others = held
        places = self._places(held[first])
        if self.cost == "activations":
            costs = self._by_activations(program, members, places, data)
        else:
            costs = {n: {p: _by_weights(held[n], held[first], p) for p in places} for n in others}
        aligned, moved = [held[first]], dict[str, float]()
        for name in others:
            plans = {p: self._transport(costs[name][p], f"{name}, {p}") for p in places}
            aligned.append(_aligned(held[name], plans))
            moved[name] = sum(_off_diagonal(plan) for plan in plans.values()) / len(plans)
        tensors = {n: mean([a[n] for a in aligned]) for n in held[first]}
        return Plan({"moved": moved}, tensors)

    def _places(self, tensors: Values) -> list[str]:
        """Where bottlenecks are: names of their modules below the adapter's."""
        downs = [n.removesuffix(".down") for n in tensors if n.endswith(".down")]
        places = [p for p in downs if tensors[f"{p}.down"].dim() == 2 and f"{p}.up" in tensors]
        inside = [n for n in tensors if n.rpartition(".")[0] not in places]
        if not places or inside:
            raise PassError(
                f"{self.text}: it aligns the inner units of bottleneck adapters, and "
                f"{inside[0] if inside else 'this adapter'} is none. Choose adapters of "
                "serial_adapter or parallel_adapter, or adapter_soup, which aligns nothing."
            )
        return places

    def _by_activations(
        self, program: State, members: Mapping[str, Source], places: list[str], data: Any
    ) -> dict[str, dict[str, Tensor]]:
        """Member but the first -> place -> cost `[r, r]`."""
        if not isinstance(data, Iterable):
            raise PassError(
                f"{self.text}: cost=activations needs batches. Give some: run(program, ..., "
                "data=[{'input_ids': ids}, ...]), or choose cost=weights."
            )
        batches = list(data)  # pyright: ignore[reportUnknownArgumentType]
        given = [_activations(*alone(program, m), places, batches) for m in members.values()]
        first, *others = given
        if not batches or min(len(v) for v in first.values()) == 0:
            raise PassError(f"{self.text}: there are no tokens in the batches. Give others.")
        return {
            name: {p: torch.cdist(own[p].mT, first[p].mT).square() for p in places}
            for name, own in zip(list(members)[1:], others, strict=True)
        }

    def _transport(self, cost: Tensor, where: str) -> Tensor:
        """`r T` `[r, r]` of a cost.

        Raises:
            PassError: what comes back is no plan.
        """
        import warnings

        try:
            import ot
        except ImportError as error:
            raise OptionError(
                f"{self.text}: POT, which does the transport, cannot be imported ({error}). "
                "Install it: pip install POT."
            ) from error
        c, r = cost.double().cpu().numpy(), len(cost)
        uniform, largest = np.full(r, 1 / r), float(c.max())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is checked below
            found: Any = ot.emd(uniform, uniform, c) if self.solver == "emd" else ot.sinkhorn(
                uniform, uniform, c, self.regularisation * (largest or 1.0),
                method="sinkhorn_log", numItermax=100_000, stopThr=_OFF / 10 / r,
            )  # fmt: skip
        plan = torch.from_numpy(np.asarray(found)).to(cost.device) * r
        off = max(float((plan.sum(axis) - 1).abs().max()) for axis in (0, 1))
        if not off <= _OFF:  # not a number is off, too
            raise PassError(
                f"{self.text}: {where}: the transport's marginals are off by {off:.2g}. Choose "
                "solver=emd, or a larger regularisation."
            )
        return plan


def _by_weights(one: Values, other: Values, place: str) -> Tensor:
    """The squared distance of the units of two adapters at a place, `[r, r]`."""
    units = [
        torch.cat([t[f"{place}.down"].double(), t[f"{place}.up"].double().mT], 1)
        for t in (one, other)
    ]
    return torch.cdist(units[0], units[1]).square()


def _activations(
    program: State, name: str, places: list[str], data: list[Any]
) -> dict[str, Tensor]:
    """Place -> what its units give `[tokens, r]`, in float64."""
    folder = f"{BRANCHES}.{name}."
    paths = {p: max((a.path for a in program.attached_by(name)
                     if f"{folder}{p}.".startswith(f"{a.path}.")), key=len)
             for p in places}  # fmt: skip
    found: dict[str, list[Tensor]] = {p: [] for p in places}
    for rows in operand_rows(program, data, list(dict.fromkeys(paths.values())), "seen"):
        for place, path in paths.items():
            branch: Any = program.module.get_submodule(path)
            with torch.no_grad():
                found[place].append(branch.units(rows[path]).double())
    return {p: torch.cat(each) for p, each in found.items() if each}


def _aligned(tensors: Values, plans: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter with its units carried to others."""
    moved = dict(tensors)
    for place, plan in plans.items():
        for name in ("down", "down_bias"):
            if (own := tensors.get(f"{place}.{name}")) is not None:
                moved[f"{place}.{name}"] = (plan.mT @ own.double()).to(own.dtype)
        up = tensors[f"{place}.up"]
        moved[f"{place}.up"] = (up.double() @ plan).to(up.dtype)
    return moved


def _off_diagonal(plan: Tensor) -> float:
    """The share of mass that goes to a unit of another number."""
    return 1 - float(plan.diagonal().sum()) / len(plan)
