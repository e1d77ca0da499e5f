"""An invertible adapter where a stream begins, as other libraries' files have it."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from ..parts.parts import Coupling, Part
from .bottleneck import ACTIVATIONS
from .branch import Serial
from .shapes import linear

TENSORS = tuple(f.name for f in fields(Coupling) if f.name not in ("target", "activation"))


class CouplingBranch(Serial):
    """`y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`; its tensors are those of the part."""

    not_foldable = "its activation function is not linear"

    def __init__(self, part: Coupling, like: Tensor) -> None:
        super().__init__()
        for name in TENSORS:
            self.register_parameter(name, nn.Parameter(getattr(part, name).to(like, copy=True)))
        self.activation = part.activation

    def transform(self, h: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        half = h.shape[-1] // 2
        first, second = h[..., :half], h[..., half:]
        first = first + self._inner(second, "first")
        return torch.cat([first, second + self._inner(first, "second")], -1)

    def update(self, h: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.transform(h) - h

    def part(self) -> Part:
        own = {n: p.detach() for n, p in self.named_parameters()}
        return Coupling("", **own, activation=self.activation)

    def describe(self) -> str:
        return f"invertible, bottleneck={len(self.get_parameter('first_down'))}, {self.activation}"

    def _inner(self, x: Tensor, side: str) -> Tensor:
        down, down_bias, up, up_bias = (
            self.get_parameter(f"{side}_{leaf}") for leaf in ("down", "down_bias", "up", "up_bias")
        )
        return linear(ACTIVATIONS[self.activation](linear(x, down, down_bias)), up, up_bias)
