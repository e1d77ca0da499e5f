"""Bottlenecks whose tensors are generated, and what `hyperformer` and `pha` generate them with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.branch import Serial


class Generator(nn.Module):
    """`forward(z [dim]) -> [sites, size]`: one row of adapter weights a site of a stream, whose
    rows of the tables (`layers` and `blocks`) are in `places [sites, tables]`; of several tasks,
    `[tasks, dim] -> [sites, tasks, size]`."""

    places: Tensor

    def __init__(
        self,
        places: Tensor,
        dims: tuple[int, int, int],
        size: int,
        tables: Sequence[str] = ("layers", "blocks"),
    ) -> None:
        super().__init__()
        dim, hidden, projected = dims
        self.register_buffer("places", places, persistent=False)
        self.tables = tuple(tables)
        for name, rows in zip(tables, (places.amax(0) + 1).tolist(), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(rows, dim)))
        inside = (1 + len(tables)) * dim
        self.inner, self.outer = nn.Linear(inside, hidden), nn.Linear(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6)
        self.heads = nn.Linear(projected, size)

    def forward(self, task: Tensor) -> Tensor:
        sites, ones = len(self.places), (1,) * (task.dim() - 1)
        where = [task.expand(sites, *task.shape)]
        for name, rows in zip(self.tables, self.places.unbind(1), strict=True):
            own = self.get_parameter(name)[rows].view(sites, *ones, -1)
            where.append(own.expand(sites, *task.shape))
        return self.heads(self.norm(self.outer(F.relu(self.inner(torch.cat(where, -1))))))


class Projector(nn.Sequential):
    """`W2 ReLU(W1 z)` of a task's embedding z `[dim]`: `[projected]`."""

    def __init__(self, dim: int, hidden: int, projected: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, projected))


class HyperFormerBranch(Serial):
    """An adapter of generated weights or, once settled, of its own: one tensor each of `shapes`."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.shapes = {
            "down": (bottleneck, width), "down_bias": (bottleneck,), "up": (width, bottleneck),
            "up_bias": (width,), "scale": (width,), "shift": (width,),
        }  # fmt: skip
        self.sizes = [torch.Size(s).numel() for s in self.shapes.values()]

    def parts(self, weights: Tensor) -> dict[str, Tensor]:
        """The adapter's tensors from one row of what a generator gives."""
        flat = zip(self.shapes.items(), weights.split(self.sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in flat}

    def update(self, h: Tensor, weights: Tensor | None = None) -> Tensor:
        own = {n: getattr(self, n) for n in self.shapes} if weights is None else self.parts(weights)
        down, bias, up, up_bias, scale, shift = (own[n].to(h.dtype) for n in self.shapes)
        y = F.linear(F.gelu(F.linear(h, down, bias), approximate="tanh"), up, up_bias)
        return F.layer_norm(y, y.shape[-1:], scale, shift)

    def settled(self, **decided: Tensor) -> Self:
        fixed = copy.deepcopy(self)
        for name, part in self.parts(decided["weights"]).items():
            fixed.register_parameter(name, nn.Parameter(part.clone()))
        return fixed

    def describe(self) -> str:
        return f"bottleneck={self.shapes['down'][0]}"


def initialise(module: nn.Module, drawn: torch.Generator) -> None:
    """Linears become N(0, 0.01^2), their biases zero."""
    for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.01, generator=drawn)
        nn.init.zeros_(linear.bias)
