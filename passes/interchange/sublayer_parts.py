"""Inserting parts of imported adapters that stand in the stream: bottlenecks, fusions, gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...rewriter.branches.bottleneck import BottleneckBranch
from ...rewriter.branches.coupling import CouplingBranch
from ...rewriter.edits.calls.call import Value
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import BaseMismatchError, PassError, nearest
from ...rewriter.parts.parts import (
    Bottleneck,
    Coupling,
    Fusion,
    Hypercomplex,
    LowRank,
    Prefix,
)
from ...rewriter.program.sites import EmbeddingSite, Site, SublayerSite, WeightSite
from ...rewriter.program.state import State
from ..additive.adapter_fusion import AdapterFusionBranch
from ..hybrid.mean_gate import Gate
from ..reparameterized.kronecker_sums import insert_hypercomplex


def sites_of(program: State, name: str, lookup: bool) -> list[WeightSite]:
    """The sites of a weight by any of its names: its lookups, or its products.

    Raises:
        BaseMismatchError: there is none.
    """
    stored = program.tensors.stored(name)
    every = [s for s in program.sites if isinstance(s, WeightSite)]
    sites = [s for s in every if s.weight == stored and isinstance(s, EmbeddingSite) == lookup]
    if not sites:
        what = "looks up" if lookup else "multiplies by"
        raise BaseMismatchError(
            f"no call of this model {what} {name!r}. Nearest: "
            f"{nearest(name, {s.weight for s in every})}. Use the base that the adapter was "
            "trained on."
        )
    return sites


def require_size(fits: bool, name: str, tensor: Tensor) -> None:
    """Raises BaseMismatchError where a tensor does not fit."""
    if not fits:
        raise BaseMismatchError(
            f"the adapter has {list(tensor.shape)} for {name}, which does not fit this model. Use "
            "the base that the adapter was trained on."
        )


def gate_of(
    edit: Editor, site: Site, part: LowRank | Prefix | Bottleneck, seen: Value | None = None
) -> Value | None:
    """The gate of a part: the mean over all tokens that the site reads, or `seen`, in causal models
    as well (`Imported.ahead`)."""
    if part.gate is None or part.gate_bias is None:
        return None
    hidden = edit.hidden(site, seen)
    if hidden is None:
        raise PassError(f"the adapter has a gate at {site.id}, where tokens cannot be told apart.")
    require_size(part.gate.shape == (1, hidden.width), site.id, part.gate)
    like = edit.like(site)
    gate = Gate(part.gate.to(like, copy=True), hidden.axes, "all")
    with torch.no_grad():
        gate.bias.copy_(part.gate_bias)
    return edit.share(f"{edit.name(site)}.gate", gate, hidden=hidden.value)


def sublayer_of(program: State, name: str) -> SublayerSite:
    """The sublayer whose last product is with a weight.

    Raises:
        BaseMismatchError: there is none.
    """
    linear = sites_of(program, name, False)[0]
    role = {"o": "attn", "ffn.down": "ffn"}.get(linear.role)
    wanted = role, linear.stream, linear.layer, getattr(linear, "cross", False)
    for site in program.sites:
        if not isinstance(site, SublayerSite):
            continue
        if (site.role, site.stream, site.layer, site.cross) == wanted:
            return site
    raise BaseMismatchError(
        f"{name} is no last product of a sublayer of this model. Use the base that the adapter was "
        "trained on."
    )


def seen_of(edit: Editor, site: SublayerSite, reads: str) -> Value | None:
    """What a branch on a sublayer's output reads beside it."""
    if reads == "output":
        return None
    words = {"residual": edit.input, "input": edit.operand, "stream": edit.behind}
    seen = words[reads](site)
    if seen is None:
        raise PassError(f"the adapter reads the {reads} at {site.id}, which is laid out otherwise.")
    return seen


def insert_bottleneck(edit: Editor, part: Bottleneck) -> None:
    site = sublayer_of(edit.program, part.target)
    require_size(part.down.shape[1:] == (site.width,), part.target, part.down)
    require_size(part.up.shape == (site.width, len(part.down)), part.target, part.up)
    seen = seen_of(edit, site, part.reads)
    gate = gate_of(edit, site, part, edit.output(site) if seen is None else seen)
    edit.after(site, BottleneckBranch(part, edit.like(site)), gate=gate, seen=seen)


def insert_compacter(edit: Editor, parts: Sequence[Hypercomplex]) -> None:
    """Puts all such parts of an adapter behind their sublayers."""
    placed: list[tuple[SublayerSite, Hypercomplex]] = []
    for part in parts:
        site = sublayer_of(edit.program, part.target)
        n, rows, _ = part.down_left.shape
        require_size(n * rows == part.width == site.width, part.target, part.down_left)
        placed.append((site, part))
    if placed:
        insert_hypercomplex(edit, placed)


def insert_coupling(edit: Editor, part: Coupling) -> None:
    site = sites_of(edit.program, part.target, True)[0]
    if not isinstance(site, EmbeddingSite):
        raise BaseMismatchError(
            f"{part.target} is no table of tokens. Use the base that the adapter was trained on."
        )
    first, second = site.width // 2, site.width - site.width // 2
    for down, up, reads, writes in (
        (part.first_down, part.first_up, second, first),
        (part.second_down, part.second_up, first, second),
    ):
        require_size(down.shape[1:] == (reads,), part.target, down)
        require_size(up.shape == (writes, len(down)), part.target, up)
    edit.after(site, CouplingBranch(part, edit.like(site)))


def insert_fusion(edit: Editor, part: Fusion) -> None:
    site = sublayer_of(edit.program, part.target)
    members = part.members.split(",")
    for matrix in (part.query, part.key, part.value):
        require_size(matrix.shape == (site.width, site.width), part.target, matrix)
    edit.hold(*members)
    branch = AdapterFusionBranch(part.query, part.key, 1.0, 0.0)
    with torch.no_grad():
        branch.value.copy_(part.value)
        for own, theirs in (
            (branch.query_bias, part.query_bias), (branch.key_bias, part.key_bias),
        ):  # fmt: skip
            if own is not None:
                own.copy_(theirs)
    seen = seen_of(edit, site, part.reads)
    edit.combine(site, branch.to(edit.like(site)), members, seen=seen)
