"""CIAT: adapters of each language, beside every sublayer and behind the embeddings.

Zhu et al., Findings EMNLP 2021, arXiv:2104.08154 (counter-interference adapters for translation).
Behind the token embeddings e, and beside each self-attention and feed-forward block, which read z,

    e <- e + U relu(D LN(e) + b_D) + b_U,    h <- h + U relu(D LN(z) + b_D) + b_U

with norms of their own (epsilon 1e-6), z being normed already where norms come first. Pairs of
languages are trained one by one (the paper), or together: with `languages` above 1 the program has
a new input, the language of the batch, and `bake{inputs={language=2}}` leaves one. D and U start
Glorot uniform, as in the authors' code: not the identity, which `init=zero` (U zero) gives. The
authors train the adapters with the model's own dropout off. A table that encoder and decoder share
has an adapter for each. Not foldable, because of the non-linearity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ...rewriter.branches.bottleneck import BottleneckBranch
from ...rewriter.branches.branch import Axes, Serial
from ...rewriter.branches.input_shift import OutputShift
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.measure.constants import constant_reads
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import EmbeddingSite, SublayerSite
from ...rewriter.program.state import State
from .languages import LANGUAGE_AXES, Languages


class CIATBranch(Serial):
    """Beside a sublayer."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[Axes] = {**LANGUAGE_AXES, "seen": ("...", "width")}

    def __init__(self, inner: Languages) -> None:
        super().__init__()
        self.inner = inner

    def update(self, h: Tensor, seen: Tensor, language: Tensor | None = None) -> Tensor:
        """`seen`: z, of the shape of h."""
        return self.inner(self.features_last(seen), language)

    def settled(self, **decided: Any) -> Self:
        return type(self)(self.inner.only(decided["language"]))

    def describe(self) -> str:
        return self.inner.describe()


class CIATEmbedding(OutputShift):
    """Behind a table's lookup."""

    not_foldable = BottleneckBranch.not_foldable
    axes: ClassVar[Axes] = {
        n: tuple("out" if a == "width" else a for a in axes) for n, axes in LANGUAGE_AXES.items()
    }

    def __init__(self, inner: Languages) -> None:
        super().__init__()
        self.inner = inner

    def shift(self, e: Tensor, language: Tensor | None = None) -> Tensor:
        return self.inner(e, language)

    def settled(self, **decided: Any) -> Self:
        return type(self)(self.inner.only(decided["language"]))

    def describe(self) -> str:
        return self.inner.describe()


@dataclass(frozen=True, kw_only=True)
class CIAT(Method):
    """Puts adapters beside sublayers and behind embeddings, for each of several languages.

    Attributes:
        languages: their number; for more than one, the program's new input says which, an int64
            scalar below it.
        language: name of the new input; 0 if a call leaves it out.
        bottleneck: inner width r; none for half the width of the model.
        dropout: of what the activation gives, in training.
        init: `glorot`, or `zero`: U is zero.
    """

    folds: ClassVar[str] = "no: not linear; `bake` leaves one language"

    kinds: ClassVar[tuple[str, ...]] = ("sublayer", "embedding")
    contract: ClassVar[Contract] = Contract("trainable")

    languages: int = 1
    language: str = "language"
    bottleneck: int | None = None
    dropout: float = 0.3
    init: Literal["glorot", "zero"] = "glorot"
    where: str = "attn and self and sublayer|ffn and sublayer|embedding.token"

    def check(self) -> None:
        self.require(self.languages >= 1, "languages", "at least 1")
        self.require(self.language.isidentifier(), "language", "a name")
        self.require(self.bottleneck is None or self.bottleneck >= 1, "bottleneck", "at least 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def promise(self) -> Contract:
        return Contract("identity") if self.init == "zero" else self.contract

    def insert_all(self, edit: Editor, sites: Sequence[Any], plan: Plan) -> None:
        chosen: dict[str, Value] = {}
        if self.languages > 1:
            last = self.languages - 1
            chosen["language"] = edit.add_input(self.language, torch.tensor(0), values=(0, last))
        for site in sites:
            inner = self.made(edit, site)
            if isinstance(site, EmbeddingSite):
                edit.shift(site, CIATEmbedding(inner), **chosen)
            elif (seen := edit.operand(site)) is not None:
                edit.after(site, CIATBranch(inner), seen=seen, **chosen)

    def made(self, edit: Editor, site: SublayerSite | EmbeddingSite) -> Languages:
        """The bottlenecks of one site, freshly initialised."""
        width, r = site.width, self.bottleneck or max(1, site.width // 2)
        down, up = torch.empty(self.languages, r, width), torch.zeros(self.languages, width, r)
        bound = (6 / (width + r)) ** 0.5
        down.uniform_(-bound, bound, generator=edit.generator)
        if self.init == "glorot":
            up.uniform_(-bound, bound, generator=edit.generator)
        like = edit.like(site)
        return Languages(down.to(like), up.to(like), self.dropout)

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        chosen = inputs.get(self.language)
        if chosen is None or self.languages == 1:
            return {}
        if not 0 <= chosen < self.languages:
            last = self.languages - 1
            raise PassError(f"{self.adapter}: language {chosen} is not one of 0 to {last}.")
        return constant_reads(program, program.attached_by(self.adapter), {self.language: chosen})
