"""The gate of `unipelt`: one number a sample, or one a token, of the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...rewriter.branches.shapes import linear
from ...rewriter.edits.stream.hidden import Axes, Reach


class Gate(nn.Module):
    """`mean_t sigmoid(w h_t + b)`; parameters `weight [1, width]`, `bias [1]`."""

    reach: Reach
    by_query: bool = False
    """Whether it gives `[batch, tokens, 1]` whatever axes the hidden states have."""

    def __init__(self, weight: Tensor, axes: Axes, reach: Reach) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(weight.new_zeros(1))
        self.axes, self.reach = axes, reach

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        opened = torch.sigmoid(linear(hidden, self.weight, self.bias))
        gate = self.axes.mean(opened, valid, self.reach)
        if not self.by_query:
            return gate
        return gate.movedim((self.axes.batch, self.axes.tokens[0]), (0, 1)).flatten(2)

    def extra_repr(self) -> str:
        return self.reach

    def total(self, gate: Tensor) -> Tensor:
        """The sum over samples, of each over all its tokens, and their number, `[2]`."""
        whole = gate.select(self.axes.tokens[0], -1) if self.reach == "past" else gate
        return torch.stack([whole.double().sum(), whole.new_tensor(whole.numel()).double()])
