"""Several bottlenecks, or low-rank branches, of which training runs one at random, for `adamix`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import ACTIVATIONS, BottleneckBranch
from ...rewriter.branches.branch import Axes, Delta, Serial
from ...rewriter.branches.shapes import linear
from ...rewriter.parts.parts import Bottleneck, Part
from ..reparameterized.lora import LoRABranch


class AdaMixBranch(Serial):
    """`down [M, r, d]`, `down_bias [M, r]`, `up [M or 1, d, r]`, `up_bias [M or 1, d]`."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[Axes] = {
        "down": ("expert", "rank", "width"), "down_bias": ("expert", "rank"),
        "up": ("expert", "width", "rank"), "up_bias": ("expert", "width"),
    }  # fmt: skip

    def __init__(self, down: Tensor, up: Tensor, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = nn.Parameter(down.new_zeros(down.shape[:2]))
        self.up_bias = nn.Parameter(up.new_zeros(up.shape[:2]))
        self.activation = activation

    def update(self, h: Tensor) -> Tensor:
        down, down_bias = self.one(self.down, self.down_bias)
        up, up_bias = self.one(self.up, self.up_bias)
        return linear(ACTIVATIONS[self.activation](linear(h, down, down_bias)), up, up_bias)

    def one(self, matrices: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """One projection: drawn in training, else the mean."""
        if not self.training or len(matrices) == 1:
            return matrices.mean(0), biases.mean(0)
        drawn = torch.randint(len(matrices), (1,), device=matrices.device)
        return matrices.index_select(0, drawn)[0], biases.index_select(0, drawn)[0]

    def merged(self) -> Bottleneck:
        """The one adapter that is left."""
        down, up, down_bias, up_bias = (
            p.detach().mean(0) for p in (self.down, self.up, self.down_bias, self.up_bias)
        )
        return Bottleneck("", down, up, down_bias, up_bias, self.activation)

    def settled(self, **decided: Any) -> BottleneckBranch:
        return BottleneckBranch(self.merged(), self.down)

    def part(self) -> Part:
        return self.merged()

    def describe(self) -> str:
        return f"{len(self.down)} x {len(self.up)} of bottleneck={self.down.shape[1]}"


class AdaMixDelta(Delta):
    """`a [M, r, in]`, `b [M or 1, out, r]`."""

    not_foldable = "training runs one of its experts; `bake` leaves their mean"
    axes: ClassVar[Axes] = {"a": ("expert", "rank", "in"), "b": ("expert", "out", "rank")}

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def branch(self, x: Tensor) -> Tensor:
        return linear(linear(x, _one(self, self.a)), _one(self, self.b)) * self.scale

    def settled(self, **decided: Any) -> LoRABranch:
        a, b = (p.detach().mean(0) for p in (self.a, self.b))
        return LoRABranch(a, b, self.scale, 0.0)

    def part(self) -> Part:
        return self.settled().part()

    def describe(self) -> str:
        return f"{len(self.a)} x {len(self.b)} of rank={self.a.shape[1]}, scale={self.scale:g}"


def _one(branch: nn.Module, experts: Tensor) -> Tensor:
    """One of several: drawn in training, else the mean."""
    if not branch.training or len(experts) == 1:
        return experts.mean(0)
    drawn = torch.randint(len(experts), (1,), device=experts.device)
    return experts.index_select(0, drawn)[0]
