"""Bottlenecks of several languages, of which a call runs one, for `ciat`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes
from ...rewriter.branches.shapes import linear


class Languages(nn.Module):
    """Bottlenecks of n languages: `down [n, r, d]`, `up [n, d, r]`, `gamma`, `beta [n, d]`."""

    def __init__(self, down: Tensor, up: Tensor, dropout: float) -> None:
        super().__init__()
        count, bottleneck, width = down.shape
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = nn.Parameter(down.new_zeros(count, bottleneck))
        self.up_bias = nn.Parameter(down.new_zeros(count, width))
        self.gamma = nn.Parameter(down.new_ones(count, width))
        self.beta = nn.Parameter(down.new_zeros(count, width))
        self.dropout = dropout

    def forward(self, z: Tensor, language: Tensor | None = None) -> Tensor:
        """U relu(D LN(z)) of a language, or of the only one."""
        every = self.down, self.down_bias, self.up, self.up_bias, self.gamma, self.beta
        chosen = [p[0] if language is None else p.index_select(0, language.view(1))[0]
                  for p in every]  # fmt: skip
        down, down_bias, up, up_bias, gamma, beta = chosen
        x = F.layer_norm(z, gamma.shape, gamma.to(z.dtype), beta.to(z.dtype), 1e-6)
        inner = F.dropout(F.relu(linear(x, down, down_bias)), self.dropout, self.training)
        return linear(inner, up, up_bias)

    def only(self, language: Tensor) -> Languages:
        """That of one language."""
        one = Languages(self.down[:0], self.up[:0], self.dropout)
        for name, parameter in self.named_parameters():
            kept = parameter.detach().index_select(0, language.view(1)).clone()
            one.register_parameter(name, nn.Parameter(kept))
        return one

    def describe(self) -> str:
        count, bottleneck, _ = self.down.shape
        return f"bottleneck={bottleneck}" + (f", {count} languages" if count > 1 else "")


LANGUAGE_AXES: Axes = {
    "inner.down": ("language", "rank", "width"), "inner.down_bias": ("language", "rank"),
    "inner.up": ("language", "width", "rank"), "inner.up_bias": ("language", "width"),
    "inner.gamma": ("language", "width"), "inner.beta": ("language", "width"),
}  # fmt: skip
"""Of one that a branch holds as `inner`."""
