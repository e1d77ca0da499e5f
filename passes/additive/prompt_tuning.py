"""Prompt tuning: `X <- [P; E(x)]`, trainable vectors in front of the embedded input.

Lester et al., EMNLP 2021, arXiv:2104.08691. Prompt tokens take positions 0 to length-1, are seen
by every token, and are stripped from the outputs. They start as rows of the token table (the
paper's vocabulary initialisation), or uniform in +-0.5 with `init=uniform`. Not foldable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Tokens
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.stream.tokens import entrances, separate
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import EmbeddingSite, Site
from ...rewriter.program.state import State


class PromptBranch(Tokens):
    """Parameter `prompt [length, width]`."""

    axes: ClassVar[Axes] = {"prompt": ("length", "width")}

    def __init__(self, prompt: Tensor) -> None:
        super().__init__(prompt.shape[0])
        self.prompt = nn.Parameter(prompt)

    def rows(self) -> Tensor:
        return self.prompt

    def describe(self) -> str:
        return f"length={self.length}"


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prepends trainable prompt vectors at the token embedding.

    Attributes:
        length: number of prompt tokens.
        init: `vocabulary` (rows of the table, drawn from the first `common` ids) or `uniform`.
        common: how many of the table's first rows to draw from.

    Without `where`, an encoder-decoder takes its prompt in the encoder. Other tables that the same
    ids look up (per-layer embeddings) give the row of one fixed id at the prompt's positions.
    """

    folds: ClassVar[str] = "no: they are inputs"

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")

    length: int = 20
    init: Literal["vocabulary", "uniform"] = "vocabulary"
    common: int = 5000
    where: str = "embedding.token"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.common >= 1, "common", "at least 1")

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        sites = sites if self.placed else entrances(program, sites)
        separate(program, sites)
        return sites

    def insert(self, edit: Editor, site: EmbeddingSite) -> None:
        table = edit.table(site)
        if self.init == "uniform":
            prompt = torch.rand(self.length, site.width, generator=edit.generator) - 0.5
            prompt = prompt.to(edit.like(site))
        else:
            limit = min(self.common, site.size)
            ids = torch.randint(0, limit, (self.length,), generator=edit.generator)
            prompt = table.detach()[ids.to(table.device)].to(edit.like(site), copy=True)
        edit.prepend_tokens(site, PromptBranch(prompt))
