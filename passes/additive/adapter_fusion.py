"""AdapterFusion: attention over what several trained, frozen adapters of a site would add.

Pfeiffer et al., EACL 2021, arXiv:2005.00247. With the sublayer's output h, which the adapters
read, and their updates `u_n = U_n sigma(D_n h + ..) + ..` (without the skip connection),

    p = softmax_n((Q h + b_Q) . (K u_n + b_K) / tau),    h <- h + V sum_n p_n u_n

for every token. Q and K start N(0, 0.02^2) with zero biases, V the identity plus 1e-6 beside the
diagonal; `0.01 |I - V|^2` joins the loss. Not foldable: p depends on the input; `bake` merges Q
and K exactly into one matrix (b_K is the same for all n, so softmax drops it).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.branch import Combine
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Fusion, Part
from ...rewriter.pipeline.controller import Controller, Forward
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Contract, Plan
from ...rewriter.program.state import State
from ...rewriter.storage.composed import plan_members, take_members


class AdapterFusionBranch(Combine):
    """`query`, `key`, `value [d, d]`, `query_bias`, `key_bias [d]`; no key once it is merged."""

    key: nn.Parameter | None
    key_bias: nn.Parameter | None

    def __init__(self, query: Tensor, key: Tensor, temperature: float, dropout: float) -> None:
        super().__init__()
        value = torch.full_like(query, 1e-6).fill_diagonal_(1.0)
        self.query, self.key, self.value = (nn.Parameter(m) for m in (query, key, value))
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros_like(query[0])) for _ in "qk")
        self.temperature, self.dropout = temperature, dropout

    def combine(self, h: Tensor, *updates: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen`: what the query reads instead of h, of its shape."""
        u = torch.stack(updates, -2)  # [..., members, d]
        q, shift = linear(h if seen is None else seen, self.query, self.query_bias), 0.0
        if self.key is not None and self.key_bias is not None:
            # q . (K u + b) = (K^T q) . u + q . b: one product, not one a member
            q, shift = linear(q, self.key.mT), linear(q, self.key_bias[None])
        scores = (u @ q[..., None])[..., 0] + shift
        scores = F.dropout(scores, self.dropout, self.training)
        p = (scores / self.temperature).softmax(-1)
        return linear((p[..., None] * u).sum(-2), self.value)

    def part(self) -> Part | None:
        if self.key is None or self.key_bias is None or self.temperature != 1:
            return None
        own = (self.query, self.query_bias, self.key, self.key_bias, self.value)
        q, q_bias, k, k_bias, v = (p.detach() for p in own)
        return Fusion("", "", q, q_bias, k, k_bias, v)

    def distance(self) -> Tensor:
        """`|I - V|^2`."""
        return (torch.eye(len(self.value)).to(self.value) - self.value).pow(2).sum()

    def settled(self, **decided: Any) -> Self:
        fixed = copy.deepcopy(self)
        if self.key is not None:
            fixed.query = nn.Parameter((self.key.mT @ self.query).detach())
            fixed.query_bias = nn.Parameter((self.query_bias @ self.key).detach())
        fixed.key = fixed.key_bias = None
        return fixed


class FusionController(Controller):
    """Adds the penalty of all sites to the loss."""

    method: AdapterFusion

    def loss(self, outputs: Any, batch: Any, forward: Forward) -> Tensor | None:
        here = [b for _, b in self.branches() if isinstance(b, AdapterFusionBranch)]
        return self.method.penalty * torch.stack([b.distance() for b in here]).sum()


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Fuses adapters behind sublayers: of the program, or of artifacts given as `sources`.

    The members are frozen and act through the fusion alone. Those of sources belong to the
    fusion: they are saved and removed with it. Those of the program stay adapters of their own:
    `without` the fusion, they act one behind the other again.

    Attributes:
        names: the members; all the program's adapters behind sublayers by default. With sources:
            what to call their adapters, in order; their own names by default.
        temperature: tau.
        dropout: of the scores, in training.
        penalty: weight of `|I - V|^2`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    contract: ClassVar[Contract] = Contract("trainable")
    controller: ClassVar[type[Controller]] = FusionController
    folds: ClassVar[str] = "no: attention over adapters; `bake` merges query and key"

    names: tuple[str, ...] | None = None
    temperature: float = 1.0
    dropout: float = 0.0
    penalty: float = 0.01

    def check(self) -> None:
        self.require(self.temperature > 0, "temperature", "above 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.require(self.penalty >= 0, "penalty", "at least 0")
        self.require(not self.where, "where", "left out: it fuses where its members are")

    def plan(self, program: State, data: Any = None, sources: Sequence[Any] = ()) -> Plan:
        return plan_members(program, self.names, sources, "serial")

    def apply(self, edit: Editor, plan: Plan) -> None:
        members = take_members(edit, plan)
        edit.hold(*members)
        for site_id in plan.decisions["sites"]:
            site: Any = edit.program.sites[site_id]
            shape = (site.width, site.width)
            query, key = (torch.randn(shape, generator=edit.generator) * 0.02 for _ in "qk")
            branch = AdapterFusionBranch(query, key, self.temperature, self.dropout)
            edit.combine(site, branch.to(edit.like(site)), members)

    def settle(
        self, program: State, data: Any, inputs: Mapping[str, int]
    ) -> Mapping[str, Mapping[str, Any]]:
        here = self.controller(program, self).branches()
        fusions = [(p, b) for p, b in here if isinstance(b, AdapterFusionBranch)]
        return {p: {"merged": True} for p, b in fusions if b.key is not None}
