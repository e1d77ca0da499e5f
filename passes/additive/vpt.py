"""VPT: prompts in the stream of hidden states, for models without token embeddings, too.

Jia et al., ECCV 2022, "Visual Prompt Tuning", arXiv:2203.12119. With E the stream in front of layer
i (behind the patch embedding: positions are added already), and `[.]` without prompts again,

    deep:     E_i = [L_i([P_i; E_i-1])]          shallow:  E = [L_n(... L_1([P; E_0]))]

so each layer of the deep form has prompts of its own, and what comes of them is dropped. The paper
puts them behind the class token; attention without order gives the same. They start uniform within
`sqrt(6 / (fan_in + width))`, fan_in that of the patch embedding (the width, where there is none).
In a model with positions in its attention, or with padding, they stand where the first real token
stands. The paper trains the head, too: `vpt;train{where=head}`. Not foldable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes
from ...rewriter.branches.routing import Inserted
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import ConvSite, SublayerSite


class VPTBranch(Inserted):
    """Parameter `prompt [length, width]`, with dropout in training."""

    axes: ClassVar[Axes] = {"prompt": ("length", "width")}

    def __init__(self, prompt: Tensor, dropout: float) -> None:
        super().__init__(len(prompt))
        self.prompt, self.dropout = nn.Parameter(prompt), dropout

    def rows(self) -> Tensor:
        return self.dropped(self.prompt)

    def describe(self) -> str:
        return f"length={self.length}"


@dataclass(frozen=True, kw_only=True)
class VPT(Method):
    """Inserts trainable prompts into the stream of the selected sublayers.

    Attributes:
        length: number of prompts, of each layer where deep.
        depth: `shallow` (once, in front of the first layer), or `deep` (in front of each).
        dropout: of the prompts, in training.
    """

    folds: ClassVar[str] = "no: they are inputs"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("trainable")

    length: int = 5
    depth: Literal["shallow", "deep"] = "deep"
    dropout: float = 0.0
    where: str = "attn|ffn"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def insert_all(self, edit: Editor, sites: Sequence[SublayerSite], plan: Plan) -> None:
        regions: dict[tuple[str, int | None], list[SublayerSite]] = {}
        for site in sites:
            layer = site.layer if self.depth == "deep" else None
            regions.setdefault((site.stream, layer), []).append(site)
        for chain in regions.values():
            width = chain[0].width
            bound = (6 / (_fan_in(edit, width) + width)) ** 0.5
            prompt = torch.rand(self.length, width, generator=edit.generator) * 2 - 1
            branch = VPTBranch((prompt * bound).to(edit.like(chain[0])), self.dropout)
            edit.insert_tokens(chain, branch)


def _fan_in(edit: Editor, width: int) -> int:
    """Of the patch embedding: the first convolution that gives this width."""
    for site in edit.program.sites:
        if isinstance(site, ConvSite) and edit.weight(site).out_features == width:
            return edit.stored(site.weight)[0].numel()
    return width
