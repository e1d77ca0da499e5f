"""What adapters change of the weights that they stand beside, one adapter at one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...rewriter.branches.branch import Branch, Delta
from ...rewriter.edits.edit import Editor
from ...rewriter.edits.folding.fold import branch_of
from ...rewriter.edits.linear.compose import ORDER
from ...rewriter.errors import PassError
from ...rewriter.measure.constants import constant_reads
from ...rewriter.parts.parts import LowRank
from ...rewriter.program.sites import WeightSite
from ...rewriter.program.state import State
from ...rewriter.weights.change import change_of

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Member:
    """An adapter: its branches by site, in the order of composition."""

    name: str
    branches: Mapping[str, list[Branch]]


@dataclass(frozen=True)
class Side:
    """What one adapter changes at one site.

    Attributes:
        factors: `(a [rank, in], b [out, rank])` of a low-rank change (with the number of matrices
            in front where there are several), or None.
        dense: `[count * out, in]` in float64, where there are no factors.
        bias: the change of the bias, where it changes that.
    """

    factors: Pair | None
    dense: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """Of the factors."""
        return None if self.factors is None else self.factors[0].shape[-2]

    def change(self) -> Tensor:
        """`[count * out, in]` in float64."""
        if self.factors is None:
            return self.dense if self.dense is not None else torch.zeros(())
        product = self.factors[1].double() @ self.factors[0].double()
        return product if product.dim() == 2 else product.flatten(0, 1)


def member(program: State, adapter: str, name: str) -> Member:
    """An adapter of a program, under a name.

    Raises:
        PassError: it does more than change weights, or is no linear change of them.
    """
    mine = program.attached_by(adapter)
    reads = constant_reads(program, mine)
    if reason := _obstacle(program, adapter, reads):
        raise PassError(
            f"combine: the adapter {name!r} cannot be a member: {reason}. Leave it out: "
            "names=[...]."
        )
    branches: dict[str, list[Branch]] = {}
    for attachment in sorted(mine, key=lambda a: ORDER[a.slot]):
        branch = branch_of(program, attachment, reads.get(attachment.path, {}))
        branches.setdefault(attachment.site, []).append(branch)
    return Member(name, branches)


def _obstacle(program: State, adapter: str, reads: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Why an adapter is no change of weights; empty if it is one."""
    if owned := program.owned.get(adapter):
        return f"it trains {len(owned)} tensors of the base (first: {owned[0]})"
    for attachment in program.attached_by(adapter):
        site, branch = program.sites[attachment.site], program.branch(attachment)
        if attachment.slot not in ORDER or not isinstance(site, WeightSite):
            return f"its {attachment.slot} branch at {site.id} is no change of a weight"
        if reason := getattr(branch, "not_foldable", ""):
            return f"at {site.id} {reason}"
        if left := attachment.reads.keys() - reads.get(attachment.path, {}).keys():
            return f"at {site.id} it reads {', '.join(sorted(left))}, which depends on the input"
        if (owner := program.combined(attachment.path)) is not None:
            return f"{owner.adapter} combines it with others"
        if attachment.slot == "input_scale" and site.features is not None:
            return f"at {site.id} it scales what other parts of a fused weight read, too"
    return ""


@torch.no_grad()
def side_of(edit: Editor, site: WeightSite, of: Member) -> Side | None:
    """What a member changes at a site of the editor's program; None if nothing."""
    branches = of.branches.get(site.id)
    if not branches:
        return None
    pairs = [p for b in branches if (p := _factors(b)) is not None]
    if len(pairs) == len(branches):
        a, b = (torch.cat(each, axis) for each, axis in zip(zip(*pairs, strict=True), (-2, -1),
                                                             strict=True))  # fmt: skip
        return Side((a, b))
    weight = edit.weight(site)
    stored = weight.dense() if site.features is not None else edit.matrix(site)
    dense, bias = change_of(branches, stored, weight.bias)
    if site.features is not None:
        stack = dense.unflatten(0, (site.matrices[0], -1))
        dense = stack[:, list(site.features)].flatten(0, 1)
    return Side(None, dense, bias)


def _factors(branch: Branch) -> Pair | None:
    """`(a, b)` of a branch that is low-rank and nothing else, its scale in b."""
    if not isinstance(branch, Delta):
        return None
    part = branch.part()
    if isinstance(part, LowRank) and part.magnitude is None and part.gate is None:
        return part.a, part.b.double() * part.scale
    found = branch.factors()
    return None if found is None else (found[0].detach(), found[1].detach().double() * found[2])
