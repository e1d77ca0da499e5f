"""The networks that P-tuning makes prompts with, see `p_tuning`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BiLSTM(nn.Module):
    """One layer, `[n, in] -> [n, 2 h]`, its directions side by side; parameters as torch has
    them, with the direction in front. Written out, so that it exports and compiles."""

    def __init__(self, inputs: int, h: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(2, 4 * h, inputs))
        self.weight_hh = nn.Parameter(torch.empty(2, 4 * h, h))
        self.bias_ih = nn.Parameter(torch.empty(2, 4 * h))
        self.bias_hh = nn.Parameter(torch.empty(2, 4 * h))

    def forward(self, x: Tensor) -> Tensor:
        bias = (self.bias_ih + self.bias_hh)[:, None]
        given = torch.baddbmm(bias, torch.stack([x, x.flip(0)]), self.weight_ih.mT)
        hidden = cell = torch.zeros_like(self.weight_hh[:, 0])[:, None]  # [2, 1, h]
        every: list[Tensor] = []
        for step in given.split(1, 1):
            i, f, g, o = torch.baddbmm(step, hidden, self.weight_hh.mT).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            every.append(hidden)
        ahead, back = torch.cat(every, 1).unbind(0)
        return torch.cat([ahead, back.flip(0)], -1)


class PromptNetwork(nn.Module):
    """`forward() -> P [length, d]`: of an LSTM with so many layers, or of the MLP without."""

    def __init__(
        self, length: int, d: int, h: int | None, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        recurrent = layers > 0
        h = h or (d // 2 if recurrent else d)
        self.embedding = nn.Parameter(torch.empty(length, d))
        inputs = [d, *[2 * h] * (layers - 1)] if recurrent else []
        self.lstm = nn.ModuleList(BiLSTM(i, h) for i in inputs)
        sizes = [2 * h, 2 * h, d] if recurrent else [d, h, h, d]
        ends = pairwise(sizes)
        self.mlp = nn.ModuleList(nn.Linear(i, o) for i, o in ends)
        self.dropout = dropout

    def initialise(self, generator: torch.Generator) -> None:
        """As torch does: uniform in +-1/sqrt(h) or +-1/sqrt(inputs)."""
        nn.init.normal_(self.embedding, generator=generator)
        for module in (*self.lstm, *self.mlp):
            of_linear = isinstance(module, nn.Linear)
            weight = module.get_parameter("weight" if of_linear else "weight_hh")
            size = int(weight.shape[-1])  # [out, in], or recurrent: [2, 4 h, h]
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(size**-0.5), size**-0.5, generator=generator)

    def forward(self) -> Tensor:
        x = self.embedding
        for layer, lstm in enumerate(self.lstm):
            x = F.dropout(x, self.dropout, self.training) if layer and self.dropout else x
            x = lstm(x)
        for layer, linear in enumerate(self.mlp):
            x = linear(F.relu(x) if layer else x)
        return x
