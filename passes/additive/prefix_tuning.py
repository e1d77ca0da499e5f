"""Prefix-tuning: `K <- [P_k; K]`, `V <- [P_v; V]` in every attention.

Li and Liang, ACL 2021, arXiv:2101.00190. The rows join keys after rotation; the mask sees them
everywhere; grouped queries get one row per key/value head. With `projection=m` the rows come from
a two-layer tanh MLP of width m over an embedding, as in the paper. With `init=data` they start as
the keys and values of a real prompt's first `length` tokens, given as data (the paper's start for
few examples): `run(program, "prefix_tuning{init=data}", data=[batch])`. Not foldable: the rows take
softmax mass (a zero prefix changes outputs, too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes
from ...rewriter.branches.prompts import KeyValue
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.aliases import Alias, instead, renamed
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.sites import AttentionSite
from ...rewriter.program.state import State
from .prompt_rows import rows_of, with_rows_of


class PrefixBranch(KeyValue):
    """Rows stored directly; parameters `key`, `value` `[length, kv_heads, width]`."""

    axes: ClassVar[Axes] = {n: ("length", "kv_heads", "width") for n in ("key", "value")}

    def __init__(self, key: Tensor, value: Tensor, dropout: float = 0.0) -> None:
        super().__init__(key.shape[0])
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        self.dropout = dropout

    def rows(self) -> tuple[Tensor, Tensor]:
        key, value = self.key, self.value
        return self.dropped(key), self.dropped(value)

    def describe(self) -> str:
        return f"length={self.length}"


class ProjectedPrefixBranch(KeyValue):
    """Rows from `W2 tanh(W1 E)`; parameters `embedding [length, d]` and the two linears."""

    axes: ClassVar[Axes] = {
        "embedding": ("length", "d"), "inner.weight": ("inner", "d"), "inner.bias": ("inner",),
        "outer.weight": ("rows", "inner"), "outer.bias": ("rows",),
    }  # fmt: skip

    def __init__(self, length: int, heads: int, widths: tuple[int, int], inner: int) -> None:
        super().__init__(length)
        width = heads * widths[0]
        self.heads, self.widths = heads, widths
        self.embedding = nn.Parameter(torch.empty(length, width))
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, heads * sum(widths))

    def rows(self) -> tuple[Tensor, Tensor]:
        both = self.outer(torch.tanh(self.inner(self.embedding)))
        k, v = both.split([self.heads * w for w in self.widths], 1)
        return k.unflatten(1, (self.heads, -1)), v.unflatten(1, (self.heads, -1))

    def describe(self) -> str:
        return f"length={self.length}, projection={self.inner.out_features}"


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Prepends trainable keys and values to every selected attention.

    Attributes:
        length: rows per attention.
        projection: width of the reparameterising MLP (one per attention), or none.
        std: of the normal initialisation of the rows.
        init: `normal`, or from `data`.
        shift_positions: move the tokens' positions behind the prefix, as happens when a prefix
            is fed as a cache; set it to import prefixes trained that way.
    """

    folds: ClassVar[str] = "no: its rows take softmax mass"

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    contract: ClassVar[Contract] = Contract("trainable")
    aliases: ClassVar[Mapping[str, Alias]] = {
        **renamed(num_virtual_tokens="length"),
        "prefix_projection": instead(
            "write projection=WIDTH, which every attention has its own of"
        ),
        "encoder_hidden_size": instead("that is projection="),
    }

    length: int = 20
    projection: int | None = None
    std: float = 0.02
    init: Literal["normal", "data"] = "normal"
    shift_positions: bool = False
    where: str = "attention and self"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.projection is None or self.projection >= 1, "projection", "at least 1")
        self.require(self.std >= 0, "std", "at least 0")
        plain = self.init == "normal" or self.projection is None
        self.require(plain, "init", "normal with projection=, whose rows are its output")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        plan = super().plan(program, data, sources)
        return plan if self.init == "normal" else with_rows_of(plan, program, data, self.length)

    def apply(self, edit: Editor, plan: Plan) -> None:
        super().apply(edit, plan)
        if self.shift_positions:
            edit.shift_positions(self.length)

    def insert(self, edit: Editor, site: AttentionSite) -> None:
        edit.prepend_kv(site, self.made(edit, site))

    def made(self, edit: Editor, site: AttentionSite) -> KeyValue:
        """The branch for one site, freshly initialised."""
        like = edit.like(site)
        widths = edit.key_value_widths(site)
        if self.init == "data":
            return PrefixBranch(*rows_of(edit, site))
        if self.projection is None:
            key, value = (
                torch.randn(self.length, site.kv_heads, w, generator=edit.generator) * self.std
                for w in widths
            )
            return PrefixBranch(key.to(like), value.to(like))
        branch = ProjectedPrefixBranch(self.length, site.kv_heads, widths, self.projection)
        nn.init.normal_(branch.embedding, generator=edit.generator)
        for linear in (branch.inner, branch.outer):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=edit.generator)
            nn.init.zeros_(linear.bias)
        return branch.to(like)
