"""Prompt tuning: `X <- [P; E(x)]`, trainable vectors in front of the embedded input.

Lester et al., EMNLP 2021, arXiv:2104.08691. Prompt tokens take positions 0 to length-1, are seen
by every token, and are stripped from the outputs. They start as rows of the token table (the
paper's vocabulary initialisation), uniform in +-0.5 with `init=uniform`, as the tokens of a text
with `init=text`, or with `init=classes` as the class labels (of one in several pieces the mean),
then rows of the table. Of several prompts, each stands in front of those inserted before it. Not
foldable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes
from ...rewriter.branches.prompts import Tokens
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.prompts.tokens import Halves, entrances, separate
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
    return starts.get(word, "write init=vocabulary, uniform, normal, or init=text with ids=")


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prepends trainable prompt vectors at the token embedding.

    Attributes:
        length: number of prompt tokens.
        init: `vocabulary` (rows of the table, drawn from the first `common` ids), `uniform`,
            `normal` (of deviation 1, as in PEFT), `text` or `classes`.
        common: how many of the table's first rows to draw from.
        ids: the tokens of the text, repeated or cut to `length`:
            `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        classes: the tokens of each class label, such as `[[2748],[2053]]`.
        halves: of an encoder-decoder: `encoder`, `decoder`, or `both`, each with its own prompt.

    Other tables that the same
    ids look up (per-layer embeddings) give the row of one fixed id at the prompt's positions.
    """

    folds: ClassVar[str] = "no: they are inputs"

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    contract: ClassVar[Contract] = Contract("trainable")
    aliases: ClassVar[Mapping[str, Alias]] = {
        **renamed(num_virtual_tokens="length"),
        "prompt_tuning_init": _start,
        "prompt_tuning_init_text": instead("write init=text and ids=, the tokens of that text"),
    }

    length: int = 20
    init: Literal["vocabulary", "uniform", "normal", "text", "classes"] = "vocabulary"
    common: int = 5000
    ids: tuple[int, ...] | None = None
    classes: tuple[tuple[int, ...], ...] | None = None
    halves: Halves = "encoder"
    where: str = "embedding.token"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.common >= 1, "common", "at least 1")
        for option, init in (("ids", "text"), ("classes", "classes")):
            given = getattr(self, option)
            holds = (given is not None) == (self.init == init)
            self.require(holds, option, f"given with init={init}, and only then")
        labels = self.classes or ()
        whole = all(n >= 0 for n in self._named()) and all((*labels, self.ids is None or self.ids))
        self.require(whole, "ids" if self.ids is not None else "classes", "ids of the table")
        self.require(len(labels) <= self.length, "classes", f"at most length={self.length}")

    def _named(self) -> tuple[int, ...]:
        """All ids that the options name."""
        return (*(self.ids or ()), *(n for label in self.classes or () for n in label))

    def obstacle(self, site: EmbeddingSite) -> str:
        largest = max(self._named(), default=0)
        return beyond(largest, site)

    def sites(self, program: State) -> list[Site]:
        sites = super().sites(program)
        sites = sites if self.placed else entrances(program, sites, self.halves)
        separate(program, sites)
        return sites

    def insert(self, edit: Editor, site: EmbeddingSite) -> None:
        edit.prepend_tokens(site, PromptBranch(self.start(edit, site).to(edit.like(site))))

    def start(self, edit: Editor, site: EmbeddingSite) -> Tensor:
        """Initial vectors, `[length, width]`."""
        shape = self.length, site.width
        if self.init == "uniform":
            return torch.rand(shape, generator=edit.generator) - 0.5
        if self.init == "normal":
            return torch.randn(shape, generator=edit.generator)
        table = edit.table(site).detach()
        if self.ids is not None:
            ids = torch.tensor(self.ids).repeat(-(-self.length // len(self.ids)))[: self.length]
            return table[ids.to(table.device)].clone()
        limit = min(self.common, site.size)
        ids = torch.randint(0, limit, (self.length,), generator=edit.generator)
        prompt = table[ids.to(table.device)].clone()
        for row, label in enumerate(self.classes or ()):
            prompt[row] = table[list(label)].mean(0)
        return prompt


def beyond(largest: int, site: EmbeddingSite) -> str:
    """Why an id does not fit a table; empty if it does."""
    if largest < site.size:
        return ""
    return f"the id {largest} is beyond its {site.size} rows. Choose smaller ids"
