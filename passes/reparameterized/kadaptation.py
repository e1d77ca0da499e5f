"""KAdaptation: `W + s H^T`, `H = sum_i A_i (x) u_i v_i` of n products, A_i shared by all layers.

He et al., AAAI 2023, arXiv:2203.16329. The projections of one role (queries, values) share their
n A_i `[n, n]` over all layers ("slow weights"); each matrix has its own `u_i [in / n, rank]` and
`v_i [rank, out / n]` ("fast weights"). In the authors' code A_i is a product of two vectors itself
(`rule=rank_one`, as in the published counts), in the paper's equation whole (`rule=whole`). With
`A_i = l_i r_i`, H is the product of the rows `l_i (x) u_i` and `r_i (x) v_i`, and a call costs what
a LoRA of rank n does; H is never built. The authors' code also adds one bias to queries and values
of a layer. A_i start uniform in +-0.01, u at zero: the identity, v Xavier uniform with gain
sqrt(2). In the authors' code u and v are zero both, and get no gradient, ever (`compat=true`).
Folds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import LinearSite
from .kronecker_sums import KAdaptationDelta, RankOneRule, Rule, SharedBias


@dataclass(frozen=True, kw_only=True)
class KAdaptation(Method):
    """Adds sums of Kronecker products beside every selected linear.

    Attributes:
        n: how many products are summed; it divides inputs and outputs.
        rank: of u_i v_i.
        rule: A_i is of `rank_one`, or `whole`.
        scale: s.
        bias: train one for the selected linears of a layer that have biases of one size.
        dropout: of the entries of s H, which training then builds; the authors take 0.5.
        compat: start as the authors' code does.
    """

    folds: ClassVar[str] = "exactly"

    n: int = 32
    rank: int = 1
    rule: Literal["rank_one", "whole"] = "rank_one"
    scale: float = 160.0
    bias: bool = True
    dropout: float = 0.0
    compat: bool = False
    where: str = "q|v"

    def check(self) -> None:
        for option in ("n", "rank"):
            self.require(getattr(self, option) >= 1, option, "at least 1")
        self.require(self.scale != 0, "scale", "another number than 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def obstacle(self, site: LinearSite) -> str:
        out, size = site.out_features, site.in_features
        if not (out % self.n or size % self.n):
            return ""
        return f"n={self.n} does not divide its {out} outputs and {size} inputs. Choose another n="

    def insert_all(self, edit: Editor, sites: Sequence[LinearSite], plan: Plan) -> None:
        rules = {s.role: s for s in reversed(sites)}
        reads = {role: self._rule(edit, site) for role, site in sorted(rules.items())}
        layers: dict[Any, list[LinearSite]] = {}
        for site in sites:
            if reason := site.obstacle:
                edit.skip(site, reason)
                continue
            edit.add(site, self.made(edit, site), **reads[site.role])
            key = site.stream, site.layer, site.cross, site.out_features
            layers.setdefault(key, []).append(site)
        for alike in layers.values() if self.bias else ():
            self._add_bias(edit, alike)

    def made(self, edit: Editor, site: LinearSite) -> KAdaptationDelta:
        """The branch for one site, freshly initialised."""
        size, out = site.in_features // self.n, site.out_features // self.n
        u, v = torch.zeros(self.n, size, self.rank), torch.zeros(self.n, self.rank, out)
        if not self.compat:
            bound = (12 / (self.rank + out)) ** 0.5
            v.uniform_(-bound, bound, generator=edit.generator)
        return KAdaptationDelta(u, v, self.scale, self.dropout).to(edit.like(site))

    def _rule(self, edit: Editor, site: LinearSite) -> dict[str, Value]:
        """What all sites of a role read."""
        whole = self.rule == "whole"
        shapes = [(self.n,) * 3] if whole else [(self.n,) * 2] * 2
        drawn = [torch.empty(s).uniform_(-0.01, 0.01, generator=edit.generator) for s in shapes]
        module = Rule(*drawn) if whole else RankOneRule(*drawn)
        role = site.role.replace(".", "_")
        value = edit.share(f"rule_{role}", module.to(edit.like(site)))
        if whole:
            return {"rule": value}
        return {"left": edit.item(value, 0), "right": edit.item(value, 1)}

    def _add_bias(self, edit: Editor, sites: Sequence[LinearSite]) -> None:
        """One bias for all of some sites."""
        features: dict[str, list[int]] = {}
        for site in sites:
            if site.bias:
                features.setdefault(site.bias, []).extend(site.features or ())
        if not features:
            return
        like = edit.like(sites[0])
        bias = SharedBias(like.new_zeros(sites[0].out_features), list(features.values()))
        edit.express(sites[0], list(features), bias)
