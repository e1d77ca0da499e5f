"""P-tuning v2: deep prompts, `K <- [P_k; K]`, `V <- [P_v; V]` in every layer, trained directly.

Liu et al., ACL 2022, arXiv:2110.07602. The rows of all layers are one embedding, N(0, 1) in the
authors' code, with dropout in training. With `projection=m` they are its image under a two-layer
tanh MLP that all attentions of a stream share, `W2 tanh(W1 E)`, E `[length, d]`, and `bake` puts
the rows in its place, exactly. The authors feed the rows as a cache, which moves the tokens'
positions behind them: `shift_positions=true`. `init=data`: see `prefix_tuning`. Not foldable: rows
take softmax mass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.prompts import KeyValue
from ...rewriter.edits.edit import Editor
from ...rewriter.measure.constants import constant_reads
from ...rewriter.pipeline.controller import Controller
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Pass
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import AttentionSite
from ...rewriter.program.state import State
from ..merging.bake import Bake
from .prefix_tuning import PrefixBranch
from .prompt_rows import rows_of, with_rows_of


class PromptEncoder(nn.Module):
    """`forward() -> W2 tanh(W1 E)`, in one part `[length, size]` for each of `sizes`."""

    def __init__(self, embedding: Tensor, inner: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.embedding, self.sizes = nn.Parameter(embedding), list(sizes)
        self.inner = nn.Linear(embedding.shape[1], inner)
        self.outer = nn.Linear(inner, sum(sizes))

    def forward(self) -> tuple[Tensor, ...]:
        return self.outer(torch.tanh(self.inner(self.embedding))).split(self.sizes, 1)


class EncodedPrefixBranch(KeyValue):
    """Rows of a shared encoder: `kv_heads` keys and as many values of `widths`."""

    def __init__(self, length: int, heads: int, widths: tuple[int, int], dropout: float) -> None:
        super().__init__(length)
        self.heads, self.widths, self.dropout = heads, widths, dropout

    def rows(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """`encoded`: `[length, kv_heads * (key width + value width)]`."""
        k, v = self.dropped(encoded).split([self.heads * w for w in self.widths], 1)
        return k.unflatten(1, (self.heads, -1)), v.unflatten(1, (self.heads, -1))

    def settled(self, **decided: Tensor) -> PrefixBranch:
        plain, self.dropout = self.dropout, 0.0
        key, value = (r.contiguous() for r in self.rows(decided["encoded"]))
        self.dropout = plain
        return PrefixBranch(key, value, plain)

    def describe(self) -> str:
        return f"length={self.length}, encoded"


class EncodedController(Controller):
    """Nothing while it trains; then the rows take the encoder's place."""

    def finish(self) -> tuple[Pass, ...]:
        encoded = any(a.reads for a in self.program.attached_by(self.adapter))
        return (Bake(names=(self.adapter,)),) if encoded else ()


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Method):
    """Prepends trainable keys and values to every selected attention.

    Attributes:
        length: rows per attention.
        projection: width m of the shared encoder, or none.
        std: of the normal initialisation of the rows, or of E.
        dropout: of the rows, in training.
        init: `normal`, or from `data`.
        shift_positions: move the tokens' positions behind the rows, as the authors' code does.
    """

    folds: ClassVar[str] = "no: its rows take softmax mass; `bake` drops the encoder"

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    contract: ClassVar[Contract] = Contract("trainable")
    controller: ClassVar[type[Controller]] = EncodedController

    length: int = 20
    projection: int | None = None
    std: float = 1.0
    dropout: float = 0.1
    init: Literal["normal", "data"] = "normal"
    shift_positions: bool = False
    where: str = "attention and self"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.projection is None or self.projection >= 1, "projection", "at least 1")
        self.require(self.std >= 0, "std", "at least 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        plain = self.init == "normal" or self.projection is None
        self.require(plain, "init", "normal with projection=, whose rows are its output")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        plan = super().plan(program, data, sources)
        return plan if self.init == "normal" else with_rows_of(plan, program, data, self.length)

    def insert_all(self, edit: Editor, sites: Sequence[AttentionSite], plan: Plan) -> None:
        if self.projection is None:
            super().insert_all(edit, sites, plan)
        else:
            for place in dict.fromkeys((s.stream, s.cross) for s in sites):
                self._encoded(edit, [s for s in sites if (s.stream, s.cross) == place])
        if self.shift_positions:
            edit.shift_positions(self.length)

    def insert(self, edit: Editor, site: AttentionSite) -> None:
        if self.init == "data":
            edit.prepend_kv(site, PrefixBranch(*rows_of(edit, site), self.dropout))
            return
        key, value = (
            torch.randn(self.length, site.kv_heads, width, generator=edit.generator) * self.std
            for width in edit.key_value_widths(site)
        )
        like = edit.like(site)
        edit.prepend_kv(site, PrefixBranch(key.to(like), value.to(like), self.dropout))

    def _encoded(self, edit: Editor, sites: Sequence[AttentionSite]) -> None:
        """One encoder for the attentions of a stream with itself, or with another."""
        first, inner = sites[0], self.projection or 1
        widths = [edit.key_value_widths(s) for s in sites]
        sizes = [s.kv_heads * sum(w) for s, w in zip(sites, widths, strict=True)]
        width = first.heads * widths[0][0]
        embedding = torch.randn(self.length, width, generator=edit.generator) * self.std
        encoder = PromptEncoder(embedding, inner, sizes)
        for linear in (encoder.inner, encoder.outer):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=edit.generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=edit.generator)
        name = f"{first.stream or 'all'}_{'cross' if first.cross else 'self'}"
        encoded = edit.share(name, encoder.to(edit.like(first)))
        for row, (site, each) in enumerate(zip(sites, widths, strict=True)):
            branch = EncodedPrefixBranch(self.length, site.kv_heads, each, self.dropout)
            edit.prepend_kv(site, branch, encoded=edit.item(encoded, row))

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        return constant_reads(program, program.attached_by(self.adapter))
