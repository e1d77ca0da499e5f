"""Sums of Kronecker products, whose first factors several places share, for `compacter` and
`kadaptation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewriter.branches.bottleneck import ACTIVATIONS, BottleneckBranch
from ...rewriter.branches.branch import Delta, Expression, Serial
from ...rewriter.branches.shapes import linear
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.parts.parts import Bottleneck, Hypercomplex, LowRank, Part
from ...rewriter.products.kronecker import hypercomplex, hypercomplex_matrix
from ...rewriter.program.sites import SublayerSite


class Rule(nn.Module):
    """`forward() -> A [n, n, n]`."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self) -> Tensor:
        return self.a


class CompacterBranch(Serial):
    """The tensors of a `Hypercomplex` part but for A, which it reads."""

    not_foldable = BottleneckBranch.not_foldable

    down_left: Tensor
    down_right: Tensor | None
    up_left: Tensor
    up_right: Tensor | None
    down_bias: Tensor
    up_bias: Tensor

    def __init__(self, part: Hypercomplex, like: Tensor) -> None:
        super().__init__()
        for name in ("down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias"):
            tensor = getattr(part, name)
            own = None if tensor is None else nn.Parameter(tensor.to(like, copy=True))
            self.register_parameter(name, own)
        names = "activation", "scale", "dropout"
        self.options: dict[str, Any] = {name: getattr(part, name) for name in names}
        self.dropout = part.dropout

    def update(self, h: Tensor, down_rule: Tensor, up_rule: Tensor) -> Tensor:
        """`down_rule`, `up_rule`: A of each projection, `[n, n, n]`."""
        inner = hypercomplex(h, down_rule, self.down_left, self.down_right)
        inner = ACTIVATIONS[self.options["activation"]](inner + self.down_bias.to(h.dtype))
        up = hypercomplex(inner, up_rule, self.up_left, self.up_right)
        return self.dropped((up + self.up_bias.to(h.dtype)) * self.options["scale"])

    def settled(self, **decided: Tensor) -> BottleneckBranch:
        down, up = (
            hypercomplex_matrix(rule, left, right).mT.detach().contiguous()
            for rule, left, right in (
                (decided["down_rule"], self.down_left, self.down_right),
                (decided["up_rule"], self.up_left, self.up_right),
            )
        )
        biases = self.down_bias.detach(), self.up_bias.detach()
        part = Bottleneck("", down, up, *biases, **self.options)
        return BottleneckBranch(part, self.down_bias)

    def part(self) -> Part | None:
        """Of a branch that is `bound`."""
        if not self.constants:
            return None
        own: dict[str, Any] = {n: p.detach() for n, p in self.named_parameters()}
        return Hypercomplex("", **own, **self.constants, **self.options)

    def describe(self) -> str:
        n, _, rank = self.down_left.shape
        factors = "" if self.down_right is None else f", rank={rank}"
        return f"n={n}, bottleneck={len(self.down_bias)}{factors}, {self.options['activation']}"


class RankOneRule(nn.Module):
    """`forward() -> (l [n, n], r [n, n])`, rows l_i and r_i, `A_i = l_i r_i`."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.left, self.right


class KAdaptationDelta(Delta):
    """`s x H`; parameters `u [n, in / n, rank]`, `v [n, rank, out / n]`. It reads `rule` A, or
    `left` and `right`."""

    def __init__(self, u: Tensor, v: Tensor, scale: float, entries: float) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)
        self.scale, self.entries = scale, entries

    def branch(self, x: Tensor, **reads: Tensor) -> Tensor:
        if self.training and self.entries:
            return linear(x, F.dropout(self.delta(**reads), self.entries))
        if "rule" in reads:
            return hypercomplex(x, reads["rule"], self.u, self.v) * self.scale
        a, b = self.low_rank(**reads)
        return linear(linear(x, a), b) * self.scale

    def low_rank(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """`(a [n rank, in], b [out, n rank])`, `H^T = b a`."""
        a = torch.einsum("ia,ipr->irap", left, self.u).flatten(2).flatten(0, 1)
        b = torch.einsum("ib,irq->bqir", right, self.v).flatten(2).flatten(0, 1)
        return a, b

    def delta(self, **reads: Tensor) -> Tensor:
        if "rule" in reads:
            return hypercomplex_matrix(reads["rule"], self.u, self.v).mT * self.scale
        a, b = self.low_rank(**reads)
        return b @ a * self.scale

    def part(self) -> Part | None:
        """Of a branch that is `bound`: a LoRA of rank n, where the rules are of rank one."""
        if "left" not in self.constants:
            return None
        a, b = self.low_rank(**self.constants)
        return LowRank("", a.detach(), b.detach(), self.scale)

    def describe(self) -> str:
        return f"n={len(self.u)}, rank={self.v.shape[1]}, scale={self.scale:g}"


class SharedBias(Expression):
    """Adds one vector `bias [out]` to stored biases, or to features of theirs, one set behind the
    other."""

    def __init__(self, bias: Tensor, features: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        for number, own in enumerate(features):
            index = torch.tensor(own, dtype=torch.long)
            index = index if bias.is_meta else index.to(bias.device)  # there, it keeps its values
            self.register_buffer(f"features{number}", index, persistent=False)

    def forward(self, *w: Tensor) -> Any:
        added = [self._added(t, getattr(self, f"features{k}")) for k, t in enumerate(w)]
        return added[0] if len(added) == 1 else tuple(added)

    def _added(self, w: Tensor, features: Tensor) -> Tensor:
        bias = self.bias.to(w.dtype)
        if not len(features):
            return w + bias
        return w.index_add(0, features, bias.repeat(len(features) // len(bias)))


def insert_hypercomplex(edit: Editor, parts: Sequence[tuple[SublayerSite, Hypercomplex]]) -> None:
    """Puts the branches of parts behind sublayers; equal A_i are one that all share."""
    (site, part), *_ = parts
    one = all(torch.equal(a, part.down_rule) for _, p in parts for a in (p.down_rule, p.up_rule))
    shared = edit.share("rule", _rule(edit, site, part.down_rule)) if one else None
    for site, part in parts:
        rules: dict[str, Value | None] = {"down_rule": shared, "up_rule": shared}
        for name in rules if shared is None else ():
            rule = _rule(edit, site, getattr(part, name))
            rules[name] = edit.share(f"{edit.name(site)}.{name}", rule)
        edit.after(site, CompacterBranch(part, edit.like(site)), **rules)


def _rule(edit: Editor, site: SublayerSite, a: Tensor) -> Rule:
    return Rule(a.to(edit.like(site), copy=True))
