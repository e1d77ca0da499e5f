"""SMoP: a router chooses one of several short prompts for each sample.

Choi et al., EMNLP 2023, sparse mixture of prompts: with x the mean of the embedded real tokens,

    p = softmax(W x),   i = argmax p,   X <- [p_i P_i; E(x)]

Where attention is causal, x is the first real token alone. Not foldable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftfx.rewriter.branches.branch import Tokens
from peftfx.rewriter.branches.shapes import linear
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.edits.stream.hidden import Axes, Reach
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.program.history import Contract
from peftfx.rewriter.program.sites import EmbeddingSite


class Router(nn.Module):
    """`forward(seen [batch, tokens, width]) -> [batch, prompts]`: the chosen one's probability."""

    def __init__(self, weight: Tensor, axes: Axes, reach: Reach) -> None:
        super().__init__()
        self.weight, self.axes = nn.Parameter(weight), axes
        self.reach: Reach = reach

    def forward(self, seen: Tensor, valid: Tensor | None = None) -> Tensor:
        pooled = self.axes.mean(seen, valid, self.reach).select(self.axes.tokens[0], 0)
        share = linear(pooled, self.weight).softmax(-1)
        places = torch.arange(share.shape[-1], device=share.device)
        return share * (places == share.argmax(-1, keepdim=True))


class SMoPBranch(Tokens):
    """`prompts [prompts, length, width]`."""

    def __init__(self, prompts: Tensor) -> None:
        super().__init__(prompts.shape[1])
        self.prompts = nn.Parameter(prompts)

    def rows(self, share: Tensor) -> Tensor:
        return torch.einsum("bn,nlw->blw", share.to(self.prompts.dtype), self.prompts)


@dataclass(frozen=True, kw_only=True)
class SMoP(Method):
    """Prepends the prompt that a router chooses.

    Attributes:
        prompts, length: how many, and how long each is.
        reach: what the router averages over; `auto` is right for the model.
    """

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")
    folds: ClassVar[str] = "no: they are inputs"

    prompts: int = 4
    length: int = 5
    reach: Literal["auto", "all"] = "auto"
    where: str = "embedding.token"

    def insert(self, edit: Editor, site: EmbeddingSite) -> None:
        hidden = edit.hidden(site, edit.output(site))
        if hidden is None:
            return
        like = edit.like(site)
        weight = torch.randn(self.prompts, site.width, generator=edit.generator) * 0.5
        reach = "first" if hidden.causal and self.reach == "auto" else "all"
        router = Router(weight.to(like), hidden.axes, reach)
        share = edit.share("router", router, seen=hidden.value, valid=hidden.valid)
        shape = self.prompts, self.length, site.width
        rows = torch.randn(shape, generator=edit.generator) * 0.5
        edit.prepend_tokens(site, SMoPBranch(rows.to(like)), share=share)
