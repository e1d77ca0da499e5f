"""APT: deep prompts whose rows the layer's input opens, `P <- lambda (a * P)` for keys and values.

Zhang et al., ACL 2023 short, "Towards Adaptive Prefix Tuning", arXiv:2305.15212. On top of
P-tuning v2, each layer has a gate for every row, `a = sigmoid(W h)`, W `[length, d]`, with h the
first real token of the stream that enters the layer (its norm, where feed-forward and attention
stand side by side), and one for the layer, a learnt number lambda.
h is the same for all queries, so that causal models stay causal. Where the paper leaves it open:
keys and values share a, or have gates of their own (`gates=own`); W starts N(0, std^2), so that
a is near 1/2, and lambda at 1. The gates depend on the input, until `bake` with calibration data
makes them numbers, their means over the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rewriter.branches.prompts import KeyValue
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.stream.hidden import Axes
from ...rewriter.errors import PassError
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract
from ...rewriter.program.sites import AttentionSite, Site, SublayerSite
from ...rewriter.program.state import State
from ...rewriter.scores.observe import observe
from .prefix_tuning import PrefixBranch


class RowGates(nn.Module):
    """`lambda sigmoid(W h)` of the first real token; `weight [rows, width]`, `layer [1]`."""

    def __init__(self, weight: Tensor, axes: Axes) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(weight), nn.Parameter(weight.new_ones(1))
        self.axes = axes

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[batch, rows]`."""
        first = self.axes.mean(hidden, valid, "first")
        for axis in sorted(self.axes.tokens, reverse=True):
            first = first.select(axis, 0)
        return torch.sigmoid(linear(first, self.weight)) * self.layer.to(first.dtype)

    def total(self, gates: Tensor) -> Tensor:
        """Sums over samples, and last the number of samples, `[rows + 1]`."""
        return torch.cat([gates.double().sum(0), gates.new_tensor([len(gates)]).double()])


class APTBranch(KeyValue):
    """Gated rows; parameters `key`, `value` `[length, kv_heads, width]`."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__(len(key))
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def rows(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """`gates`: `[batch, length]`, or those of values behind those of keys."""
        for_key, for_value = gates[:, : self.length], gates[:, -self.length :]
        return self.key * for_key[..., None, None], self.value * for_value[..., None, None]

    def settled(self, **decided: Tensor) -> PrefixBranch:
        key, value = self.rows(decided["gates"][None].to(self.key))
        return PrefixBranch(key[0], value[0])

    def describe(self) -> str:
        return f"length={self.length}"


@dataclass(frozen=True, kw_only=True)
class APT(Method):
    """Prepends gated keys and values to every selected attention.

    Attributes:
        length: rows per attention.
        gates: of a row's key and value: `shared`, or each its `own`.
        std: of the normal initialisation of the rows.
        gate_std: of the gates' weights.
        shift_positions: see `p_tuning_v2`.
    """

    folds: ClassVar[str] = "no: its rows take softmax mass; `bake` makes the gates numbers"

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    contract: ClassVar[Contract] = Contract("trainable")

    length: int = 16
    gates: Literal["shared", "own"] = "shared"
    std: float = 1.0
    gate_std: float = 0.02
    shift_positions: bool = False
    where: str = "attention and self"

    def check(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.std >= 0, "std", "at least 0")
        self.require(self.gate_std >= 0, "gate_std", "at least 0")

    def apply(self, edit: Editor, plan: Any) -> None:
        super().apply(edit, plan)
        if self.shift_positions:
            edit.shift_positions(self.length)

    def insert(self, edit: Editor, site: AttentionSite) -> None:
        layer, samples = _sublayer(edit, site), edit.samples(site)
        hidden = edit.hidden(layer)
        if hidden is None or samples is None:
            return
        if samples.order != "alone":
            edit.skip(site, "its samples lie on one axis with what belongs to each")
            return
        like, rows = edit.like(site), self.length * (1 if self.gates == "shared" else 2)
        key, value = (
            torch.randn(self.length, site.kv_heads, width, generator=edit.generator) * self.std
            for width in edit.key_value_widths(site)
        )
        weight = torch.randn(rows, hidden.width, generator=edit.generator) * self.gate_std
        opened = RowGates(weight.to(like), hidden.axes)
        name = f"{edit.name(site)}.gates"
        gates = edit.share(name, opened, hidden=hidden.value, valid=hidden.valid)
        edit.prepend_kv(site, APTBranch(key.to(like), value.to(like)), gates=gates)

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        mine = [a for a in program.attached_by(self.adapter) if "gates" in a.reads]
        if mine and data is None:
            raise PassError(
                f"the gates of {self.adapter!r} depend on the input, so making them numbers needs "
                "data to average over. Give batches of the program's inputs: "
                f"peftfx.run(program, 'bake{{names=[{self.adapter}]}}', data=[batch, ...])."
            )
        if not mine:
            return {}
        paths = {a.path: program.shared_path(a, "gates") for a in mine}
        totals: dict[str, Any] = {p: program.module.get_submodule(p).total for p in paths.values()}
        sums = observe(program, data, {p: p for p in totals}, totals)
        return {path: {"gates": sums[p][:-1] / sums[p][-1]} for path, p in paths.items()}


def _sublayer(edit: Editor, site: AttentionSite) -> Site:
    """The sublayer of an attention, whose input is the stream; the attention, whose queries read
    its norm, where it has none of its own."""
    place = site.stream, site.layer, site.cross
    for other in edit.program.sites:
        if isinstance(other, SublayerSite) and other.role == "attn" and not other.parallel:
            if (other.stream, other.layer, other.cross) == place:
                return other
    return site
