"""Intrinsic SAID and DID: `theta_i = theta_i0 + lambda_i P_i theta`, one theta for all tensors.

Aghajanyan, Gupta and Zettlemoyer, ACL 2021, arXiv:2012.13255. P_i is a fixed random projection of
theta `[d]` to the entries of stored tensor i, Fastfood or dense (`kernels/random_projection.py`),
made from the seed and from i wherever it is needed: neither files nor backward hold any of it.
Structure-aware (SAID), each tensor has a scalar lambda_i, and theta is shorter by their number, so
that `dimension` counts all that trains; without (DID), lambda_i = 1. theta starts as zero and
lambda_i as one, so step 0 is the base model. Folds exactly.

Gradients are those of the formula. The released code takes a wrong one: its transform divides by
the root of its length L_i in backward alone, twice a tensor, and counts one number too many;
`compat` does both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...kernels.random_projection import random_projection
from ...rewriter.branches.branch import Axes
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.linear.sparse import DenseDelta, Part, parts_of
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import Site
from ...rewriter.program.state import State


class Theta(nn.Module):
    """`forward() -> theta [d]`, what all tensors share."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self) -> Tensor:
        return self.theta


class ProjectedDelta(DenseDelta):
    """`lambda P theta`; parameter `scale []`, lambda, or none."""

    axes: ClassVar[Axes] = {"theta": ("dimension",)}

    def __init__(self, part: Part, stored: Tensor, method: SAID, index: int, theta: Tensor) -> None:
        super().__init__(part, stored)
        self.seed, self.index = method.random_seed, index
        self.dense = method.projection == "dense"
        self.size = math.prod(part.own_shape)
        released = method.compat and not self.dense
        self.damping = 1.0 / (1 << (self.size - 1).bit_length()) if released else 1.0
        own = nn.Parameter(theta.new_ones(())) if method.structure_aware else None
        self.register_parameter("scale", own)
        self.scale: Tensor | None

    def delta(self, random: bool, /, theta: Tensor) -> Tensor:
        if self.damping != 1:  # the value of theta, and a smaller gradient
            theta = theta.detach() + (theta - theta.detach()) * self.damping
        own = theta if self.scale is None else theta * self.scale
        change = random_projection(own, self.seed, self.index, self.size, self.dense)
        return change.view(self.piece.own_shape)

    def describe(self) -> str:
        return f"tensor {self.index}" + (", dense" if self.dense else "")


@dataclass(frozen=True, kw_only=True)
class SAID(Method):
    """Trains all selected stored tensors through one random subspace.

    Attributes:
        dimension: how many numbers train in all.
        structure_aware: with a scale for each tensor, lambda (SAID); else DID.
        projection: `fastfood`, or `dense` for small models.
        bias: also the biases of linears, convolutions and norms.
        compat: with the released gradients and count.
        where: the paper takes all tensors of the model.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "conv", "norm", "embedding")
    folds: ClassVar[str] = "exactly"

    dimension: int = 1000
    structure_aware: bool = True
    projection: Literal["fastfood", "dense"] = "fastfood"
    bias: bool = True
    compat: bool = False
    where: str = "linear|conv|experts|norm|embedding"

    def check(self) -> None:
        self.require(self.dimension >= 1, "dimension", "at least 1")

    @property
    def departures(self) -> frozenset[str]:
        released = self.compat and self.projection == "fastfood"
        return frozenset({"gradients"} if released else ())

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        decided = super().plan(program, data, sources).decisions
        parts, left = parts_of(program, self.sites(program), self.bias)
        tensors, reasons = [p.name for p in parts], [[s.id, why] for s, why in left]
        entries = sum(math.prod(p.own_shape) for p in parts)
        self.require(
            self.dimension <= entries, "dimension", f"at most {entries}, the entries selected",
            "Choose a smaller one, or select more with where=...",
        )  # fmt: skip
        rule = f"above {self._spent(len(tensors))}, with a scale for each of {len(tensors)} tensors"
        remedy = "Choose a larger one, or structure_aware=false."
        self.require(self.dimension > self._spent(len(tensors)), "dimension", rule, remedy)
        return Plan({**decided, "tensors": tensors, "left": reasons})

    def insert_all(self, edit: Editor, sites: Sequence[Site], plan: Plan) -> None:
        names: list[str] = plan.decisions["tensors"]
        edit.skipped.extend((site, why) for site, why in plan.decisions["left"])
        zeros = torch.zeros(self.dimension - self._spent(len(names)))
        shared = Theta(zeros.to(edit.like(sites[0])))
        theta = edit.share("theta", shared)
        for part in parts_of(edit.program, sites, self.bias)[0]:
            if part.name in names:
                stored, index = edit.stored(part.name), names.index(part.name)
                branch = ProjectedDelta(part, stored, self, index, shared.theta.detach())
                edit.express(part.site, part.name, branch, theta=theta)
                edit.edited.extend(site.id for site in part.sites)

    def _spent(self, tensors: int) -> int:
        """How many of the dimensions are not theta's."""
        return tensors + self.compat if self.structure_aware else 0
