"""What an adapter of a program is in parts (`rewriter/storage/parts.py`), for writers of
all formats.

Pieces of a fused weight become one part: with one `a` where all share it, else with their
ranks side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.additive.ia3 import IA3Input
from ..passes.additive.prefix_tuning import PrefixTuning
from ..passes.additive.prompt_tuning import PromptBranch
from ..passes.interchange.imported import AcrossGroups, ChangeBranch
from ..passes.reparameterized.dora import DoRABranch
from ..passes.reparameterized.lora import LoRABranch
from ..passes.selective.train_tokens import RowsExpression
from ..rewriter.api import Program
from ..rewriter.branches.branch import Branch, Delta, KeyValue, OutputScale
from ..rewriter.errors import ArtifactError, nearest
from ..rewriter.program.history import Attachment
from ..rewriter.program.sites import AttentionSite, EmbeddingSite, WeightSite
from ..rewriter.storage.parts import (
    Change,
    LowRank,
    Part,
    Parts,
    Prefix,
    Prompt,
    Rows,
    Scaling,
    Trained,
)

Piece = tuple[WeightSite, Any]


def adapter_parts(program: Program, adapter: str = "") -> Parts:
    """An adapter in parts.

    Args:
        program: which holds it unfolded.
        adapter: its name; the only one by default.

    Raises:
        ArtifactError: there is no such adapter, or a branch of it has no form in files: it reads
            other values, or is not linear.
    """
    name = _chosen(program, adapter)
    weights: dict[tuple[str, str], list[Piece]] = {}
    parts: list[Part] = []
    for attachment in (a for a in program.attachments if a.adapter == name):
        site, branch = program.sites[attachment.site], program.branch(attachment)
        if attachment.reads or attachment.members or not isinstance(branch, Branch):
            raise _unwritable(attachment, branch, "it reads other values of the graph")
        if isinstance(site, WeightSite) and isinstance(branch, Delta | DoRABranch | OutputScale):
            weights.setdefault((site.weight, branch.slot), []).append((site, branch))
        elif isinstance(branch, IA3Input) and isinstance(site, WeightSite):
            parts.append(Scaling(_name(program, site), branch.l.detach(), "in"))
        elif isinstance(branch, RowsExpression) and isinstance(site, EmbeddingSite):
            parts.append(Rows(_name(program, site), branch.ids, branch.rows.detach()))
        elif isinstance(branch, PromptBranch):
            parts.append(Prompt("", branch.prompt.detach()))
        elif isinstance(branch, KeyValue):
            parts.append(_prefix(program, attachment, branch))
        else:
            raise _unwritable(attachment, branch, "no other library has a form for it")
    parts += [_joined(program, pieces) for pieces in weights.values()]
    own = program.tensors.owned.get(name, ())
    parts += [Trained(n, program.module.get_parameter(n).detach()) for n in own]
    return Parts(tuple(parts), name)


def _chosen(program: Program, adapter: str) -> str:
    names = program.adapters
    if not adapter and len(names) == 1:
        return names[0]
    if adapter in names:
        return adapter
    have = ", ".join(names) or "none"
    if not adapter:
        raise ArtifactError(f"the program has the adapters {have}; say which: adapter=...")
    raise ArtifactError(
        f"there is no adapter {adapter!r}. Adapters: {have}; nearest: {nearest(adapter, names)}."
    )


def _unwritable(attachment: Attachment, branch: object, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{attachment.adapter}: the {type(branch).__name__} at {attachment.site} cannot be written"
        f": {reason}. Save it with peftfx.save, or fold it and write the weights."
    )


def _name(program: Program, site: WeightSite) -> str:
    """What the original model calls the weight, by the name that the site's module reads it."""
    names = program.tensors.names(site.weight)
    lookup = isinstance(site, EmbeddingSite)
    if len(names) == 1 or lookup:
        return names[0]
    own = [n for n in names if n not in {s.weight for s in program.sites if s.kind == "embedding"}]
    return own[0] if own else names[0]


def _joined(program: Program, pieces: Sequence[Piece]) -> Part:
    """One part for all that an adapter has at a weight."""
    site, branch = pieces[0]
    count, _, _ = site.matrices
    stored = program.module.get_parameter(site.weight)
    out = branch.shape.matrix(stored).shape[0]
    name = _name(program, site)
    if isinstance(branch, OutputScale):
        vector = torch.ones(out)
        for piece, scaled in pieces:
            vector[_rows(piece, out)] = scaled.scale().detach().float().cpu()
        return Scaling(name, vector, "out")
    if all(isinstance(b, LoRABranch | DoRABranch | AcrossGroups) for _, b in pieces):
        return _low_rank(name, pieces, out, count)
    change = torch.zeros(out, site.matrices[2])
    for piece, delta in pieces:
        change[_rows(piece, out)] += delta.delta().detach().float().cpu()
    method = branch.method if isinstance(branch, ChangeBranch) else type(branch).__name__
    return Change(name, change, method)


def _rows(site: WeightSite, out: int) -> Tensor:
    """The rows of `[count * out, in]` that a site has."""
    count = site.matrices[0]
    if site.features is None:
        return torch.arange(out)
    first = torch.arange(count)[:, None] * (out // count)
    return (first + torch.tensor(site.features)).flatten()


def _low_rank(name: str, pieces: Sequence[Piece], out: int, count: int) -> LowRank:
    site, first = pieces[0]
    factors = [(b.a.detach(), b.b.detach(), float(b.scale)) for _, b in pieces]
    lookup = isinstance(site, EmbeddingSite)
    magnitude = _magnitudes(pieces, out)
    if len(pieces) == 1 and site.features is None:
        return LowRank(name, *factors[0], magnitude, lookup, first.dropout)
    scale = factors[0][2]
    shared = all(torch.equal(a, factors[0][0]) and s == scale for a, _, s in factors)
    a = factors[0][0] if shared else torch.cat([a for a, _, _ in factors], -2)
    wide = torch.zeros(out, a.shape[-2], dtype=a.dtype, device=a.device)
    column = 0
    for (piece, _), (own, b, s) in zip(pieces, factors, strict=True):
        columns = slice(column, column + own.shape[-2])
        wide[_rows(piece, out), columns] = b.reshape(-1, b.shape[-1]) * (s / scale)
        column += 0 if shared else own.shape[-2]
    b = wide if count == 1 else wide.unflatten(0, (count, -1))
    return LowRank(name, a, b, scale, magnitude, lookup, first.dropout)


def _magnitudes(pieces: Sequence[Piece], out: int) -> Tensor | None:
    if not isinstance(pieces[0][1], DoRABranch):
        return None
    if sum(len(_rows(site, out)) for site, _ in pieces) != out:
        raise ArtifactError(
            f"{pieces[0][0].weight}: DoRA is on some features of a fused weight, which no other "
            "library has. Fold it, or adapt all of the weight."
        )
    magnitude = torch.empty(out)
    for site, branch in pieces:
        magnitude[_rows(site, out)] = branch.m.detach().float().cpu()
    return magnitude


def _prefix(program: Program, attachment: Attachment, branch: KeyValue) -> Prefix:
    sites: Iterable[Any] = program.sites
    order = [s.id for s in sites if isinstance(s, AttentionSite) and not s.cross]
    key, value = branch.rows()
    step: Any = next(r.applied for r in program.history if r.adapter == attachment.adapter)
    shifted = (
        step.shift_positions
        if isinstance(step, PrefixTuning)
        else _was_shifted(program, attachment)
    )
    return Prefix("", key.detach(), value.detach(), order.index(attachment.site), shifted)


def _was_shifted(program: Program, attachment: Attachment) -> bool:
    record = next(r for r in program.history if r.adapter == attachment.adapter)
    listed: Any = record.plan.decisions.get("parts", ())
    return all(p.get("shifted", True) for p in listed)
