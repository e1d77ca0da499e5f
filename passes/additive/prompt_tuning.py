"""Prompt tuning: `X <- [P; E(x)]`, trainable vectors in front of the embedded input.

Lester et al., EMNLP 2021, arXiv:2104.08691. Prompt tokens take positions 0 to length-1, are seen
by every token, and are stripped from the outputs. They start as rows of the token table (the
paper's vocabulary initialisation), or uniform in +-0.5 with `init=uniform`. Of several prompts,
each stands in front of those inserted before it. Not foldable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, Tokens
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.stream.tokens import entrances, separate
from ...rewriter.pipeline.aliases import Alias, instead, renamed
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


def _start(value: Any) -> dict[str, Any] | str:
    """`init` for PEFT's `prompt_tuning_init`."""
    word = str(getattr(value, "value", value)).upper()
    starts: dict[str, dict[str, Any]] = {
        "RANDOM": {"init": "normal"},
        "SAMPLE_VOCAB": {"init": "vocabulary", "common": 2**31},
    }
    return starts.get(word, "write init=vocabulary, uniform or normal")


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prepends trainable prompt vectors at the token embedding.

    Attributes:
        length: number of prompt tokens.
        init: `vocabulary` (rows of the table, drawn from the first `common` ids), `uniform`, or
            `normal` (of deviation 1, as in PEFT).
        common: how many of the table's first rows to draw from.

    Without `where`, an encoder-decoder takes its prompt in the encoder. Other tables that the same
    ids look up (per-layer embeddings) give the row of one fixed id at the prompt's positions.
    """

    folds: ClassVar[str] = "no: they are inputs"

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")
    aliases: ClassVar[Mapping[str, Alias]] = {
        **renamed(num_virtual_tokens="length"),
        "prompt_tuning_init": _start,
        "prompt_tuning_init_text": instead("prompts start as any rows of the table; leave it out"),
    }

    length: int = 20
    init: Literal["vocabulary", "uniform", "normal"] = "vocabulary"
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
        shape = self.length, site.width
        if self.init == "uniform":
            prompt = (torch.rand(shape, generator=edit.generator) - 0.5).to(edit.like(site))
        elif self.init == "normal":
            prompt = torch.randn(shape, generator=edit.generator).to(edit.like(site))
        else:
            limit = min(self.common, site.size)
            ids = torch.randint(0, limit, (self.length,), generator=edit.generator)
            prompt = table.detach()[ids.to(table.device)].to(edit.like(site), copy=True)
        edit.prepend_tokens(site, PromptBranch(prompt))
