"""SMoP: a router chooses one of several short prompts for each sample, `X <- [p_i P_i; E(x)]`.

Choi et al., EMNLP 2023, doi:10.18653/v1/2023.emnlp-main.884. With x the mean of the embedded real
tokens,

    p = softmax(W x (1 + e)),    i = argmax p,    e ~ N(0, 1) in training, 0 afterwards

The chosen prompt is times its probability, which is how the router learns. W starts orthogonal,
prompts as rows of the token table. Only one prompt a sample is run. The authors compute a loss
that balances the router's load and leave it out; `balance` adds it: `N sum_i f_i mean(p_i)`, f_i
the share of the batch that goes to prompt i. Where attention is causal, x is the first real token
alone, or no token would be free of later ones. Not foldable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.prompts import Tokens
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.prompts.tokens import Halves, entrances, separate
from ...rewriter.edits.stream.hidden import Axes, Reach
from ...rewriter.errors import PassError
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import EmbeddingSite, Site
from ...rewriter.program.state import State


class Router(nn.Module):
    """`forward(seen [batch, tokens, width]) -> [batch, prompts]`: the probability of the chosen
    one, 0 for the others; parameter `weight [prompts, width]`."""

    reach: Reach

    def __init__(self, weight: Tensor, axes: Axes, reach: Reach, noise: str | None) -> None:
        super().__init__()
        self.weight, self.axes, self.reach = nn.Parameter(weight), axes, reach
        self.noise, self.softmax = noise, nn.Softmax(-1)

    def forward(self, seen: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.axes.mean(seen, valid, self.reach).select(self.axes.tokens[0], 0)
        scores = linear(x, self.weight)
        if self.training and self.noise == "normal":
            scores = scores + torch.randn_like(scores) * scores.detach()
        elif self.training and self.noise == "dropout":
            scores = F.dropout(scores, 0.2)
        share = self.softmax(scores)
        places = torch.arange(share.shape[-1], device=share.device)
        return share * (places == share.argmax(-1, keepdim=True))

    def extra_repr(self) -> str:
        return f"{self.reach}, noise={self.noise}"


class SMoPBranch(Tokens):
    """`prompts [prompts, length, width]`."""

    def __init__(self, prompts: Tensor) -> None:
        super().__init__(prompts.shape[1])
        self.prompts = nn.Parameter(prompts)

    def rows(self, share: Tensor) -> Tensor:
        """`share`: what a `Router` gives."""
        chosen, place = share.max(-1)
        return self.prompts[place] * chosen[:, None, None].to(self.prompts.dtype)

    def describe(self) -> str:
        return f"{len(self.prompts)} of length={self.length}"


def balance(share: Tensor) -> Tensor:
    """`N sum_i f_i mean(p_i)` of probabilities `[batch, N]`: 1 for an even load."""
    count = share.shape[-1]
    load = F.one_hot(share.argmax(-1), count).to(share.dtype).mean(0)
    return count * (load * share.mean(0)).sum()


class SMoPController(Controller):
    """Adds the balance of what the routers gave in the last forward."""

    method: SMoP

    def __init__(self, program: State, method: Any) -> None:
        super().__init__(program, method)
        self.seen: list[Any] = []

    def start(self) -> None:
        for path in self.program.shared if self.method.balance else ():
            router = self.program.module.get_submodule(path)
            if isinstance(router, Router) and path.split(".")[1] == self.adapter:
                router.softmax.register_forward_hook(lambda _, _in, p: self.seen.append(p))

    def begin_forward(self, batch: Any) -> None:
        self.seen.clear()

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        if not self.method.balance:
            return None
        if not self.seen:
            raise PassError(
                f"{self.adapter}: the balance of its router is that of the last forward, and none "
                "was seen. Call controllers.start before it, and begin_forward."
            )
        return self.method.balance * torch.stack([balance(p) for p in self.seen]).sum()


@dataclass(frozen=True, kw_only=True)
class SMoP(Method):
    """Prepends the prompt that a router chooses.

    Attributes:
        prompts, length: how many, and how long each is.
        noise: of the router in training: `normal`, or `dropout` of its scores, or none.
        balance: weight of the load-balancing loss.
        common, halves: see `prompt_tuning`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")
    controller: ClassVar[type[Controller]] = SMoPController
    folds: ClassVar[str] = "no: they are inputs"

    prompts: int = 4
    length: int = 5
    noise: Literal["normal", "dropout"] | None = "normal"
    balance: float = 0.0
    common: int = 5000
    halves: Halves = "encoder"
    where: str = "embedding.token"

    def check(self) -> None:
        for option in ("prompts", "length", "common"):
            self.require(getattr(self, option) >= 1, option, "at least 1")
        self.require(self.balance >= 0, "balance", "at least 0")

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        sites = sites if self.placed else entrances(program, sites, self.halves)
        separate(program, sites)
        return sites

    def insert(self, edit: Editor, site: EmbeddingSite) -> None:
        hidden = edit.hidden(site, edit.output(site))
        if hidden is None:
            return
        like, table = edit.like(site), edit.table(site)
        weight = torch.empty(self.prompts, site.width)
        nn.init.orthogonal_(weight, generator=edit.generator)
        reach: Reach = "first" if hidden.causal else "all"
        router = Router(weight.to(like), hidden.axes, reach, self.noise)
        path = f"{edit.name(site)}.router"
        share = edit.share(path, router, seen=hidden.value, valid=hidden.valid)
        shape, limit = (self.prompts, self.length), min(self.common, site.size)
        ids = torch.randint(0, limit, shape, generator=edit.generator)
        rows = table.detach()[ids.to(table.device)].to(like, copy=True)
        edit.prepend_tokens(site, SMoPBranch(rows), share=share)
