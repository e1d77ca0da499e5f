"""Any adapter of weights as the LoRA that serving engines take: one rank, one alpha, no patterns.

Scales go into B, smaller ranks are filled with zeros, alpha is the rank. What is not low-rank (a
magnitude, a whole change) becomes the nearest product of that rank, by singular values, and what is
lost of it is told. Engines' published rules: vLLM and SGLang refuse `use_dora`, `modules_to_save`,
rank and alpha patterns, and biases; llama.cpp takes `lora_A` and `lora_B` of linears and tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rewriter.errors import ArtifactError, NoFormError, OptionError
from ..rewriter.parts.formula_parts import Formula
from ..rewriter.parts.parts import Change, LowRank, Part, Rows, Scaling, Trained
from ..rewriter.parts.shared_parts import unshared
from ..rewriter.program.sites import EmbeddingSite, LinearSite, WeightSite
from ..rewriter.storage.parts import Parts
from .base import Base, values

_SAID = {
    "trained": "trains {} itself", "rows": "trains rows of {}",
    "scaling": "scales what {} reads or gives", "prompt": "has a prompt",
    "prefix": "has rows in front of keys and values",
    "bottleneck": "has an adapter behind the sublayer of {}",
    "hypercomplex": "has an adapter behind the sublayer of {}",
    "coupling": "has an invertible adapter behind {}", "fusion": "weighs other adapters",
    "invoked": "acts on some tokens alone at {}",
    "lowrank": "has factors of another shape, or of what is looked up, at {}",
}  # fmt: skip
_INTO_WEIGHTS = ("trained", "rows", "scaling", "lowrank")


def no_form(rule: str, part: Part) -> NoFormError:
    """The error for a part that a format cannot hold.

    Args:
        rule: what the format holds.
        part: the first that it does not.
    """
    kind = LowRank.kind if isinstance(part, LowRank) else part.kind
    said = _SAID.get(kind, "has more, at {}").format(part.target)
    remedy = (
        "Fold it into a whole model (peftfx convert --to hf), or write it with --to peft."
        if kind in _INTO_WEIGHTS
        else "No weight holds that. Write it with --to peft or --to peftfx."
    )
    return NoFormError(f"{rule}, and this adapter {said}. {remedy}")


@dataclass(frozen=True)
class Plain:
    """The adapter and what it lost.

    Attributes:
        parts: low-rank, all of one rank and scale 1.
        lost: parameter -> the share of the change's norm that is gone, where any is.
    """

    parts: Parts
    lost: Mapping[str, float]


def plain_lora(program: Base, parts: Parts, rank: int | None = None) -> Plain:
    """The adapter as plain LoRA.

    Args:
        program: whose base it belongs to.
        parts: of an adapter, see `adapter_parts`.
        rank: of all modules; by default the largest of the adapter's own, which loses nothing of
            what is low-rank.

    Raises:
        ArtifactError: it holds more than changes of linears and tables.
        OptionError: the rank is below 1, or left out where nothing has one.
    """
    other = next((p for p in parts.parts if not isinstance(p, LowRank | Change | Formula)), None)
    if other is not None:
        raise no_form("plain LoRA holds changes of weights alone", other)
    own = [p.a.shape[-2] for p in parts.parts if isinstance(p, LowRank)]
    wanted = max(own, default=0) if rank is None else rank
    if wanted < 1:
        said = "nothing of the adapter has a rank. Say which to give it: rank=16 (--rank 16)."
        raise OptionError(said)
    lost: dict[str, float] = {}
    plain = tuple(_plain(program, p, wanted, lost) for p in parts.parts)
    return Plain(replace(parts, parts=plain, original={}), lost)


def factored(program: Base, parts: Parts, rank: int | None = None) -> Plain:
    """The adapter as pairs of factors of any ranks and scales: as it is where it is nothing else
    and no rank is asked for, else as plain LoRA; stacks of pairs stay what they are."""
    pairs = all(isinstance(p, LowRank) and p.magnitude is None for p in parts.parts)
    if pairs and rank is None:
        return Plain(parts, {})
    stacks = tuple(p for p in parts.parts if _is_stack(p, rank))
    flat = tuple(p for p in parts.parts if not _is_stack(p, rank))
    if not flat:
        return Plain(parts, {})
    done = plain_lora(program, replace(parts, parts=flat), rank)
    return Plain(replace(done.parts, parts=(*done.parts.parts, *stacks)), done.lost)


def _is_stack(part: Part, rank: int | None) -> bool:
    if not isinstance(part, LowRank) or part.magnitude is not None or part.a.dim() < 3:
        return False
    return rank is None or part.a.shape[1] <= rank


def _plain(program: Base, part: Part, rank: int, lost: dict[str, float]) -> LowRank:
    site = _site(program, part)
    if isinstance(part, LowRank) and part.magnitude is None and part.a.shape[-2] <= rank:
        if part.a.dim() > 2:
            raise NoFormError(
                f"{part.target}: serving engines have no common form for LoRA on stacks of "
                "matrices. Fold it, or write PEFT's own form."
            )
        return _filled(part, rank)
    if not isinstance(site, LinearSite):
        raise NoFormError(f"{part.target}: only changes of linears are made low-rank.")
    delta = _delta(program, part, site)
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    total, kept = float(s.square().sum()), float(s[:rank].square().sum())
    if (share := max(total - kept, 0.0) ** 0.5 / max(total, 1e-300) ** 0.5) > 1e-6:
        lost[part.target] = share
    roots = s[:rank].sqrt()
    a, b = (roots[:, None] * v[:rank]).float(), (u[:, :rank] * roots).float()
    return _filled(LowRank(part.target, a, b, 1.0), rank)


def _filled(part: LowRank, rank: int) -> LowRank:
    """With scale 1 and zeros up to a rank."""
    missing = rank - part.a.shape[0]
    a, b = part.a, part.b * part.scale
    if missing:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
    return replace(unshared(part), a=a, b=b, scale=1.0, magnitude=None, dropout=0.0)


def _delta(program: Base, part: Part, site: LinearSite) -> Tensor:
    """The change `[out, in]` of a weight."""
    if isinstance(part, Change):
        return part.delta.float()
    if isinstance(part, Formula):
        like = torch.empty(0, dtype=torch.float64)
        return change_of(program, part) if part.of_numbers else part.change(like)
    if not isinstance(part, LowRank):
        raise ArtifactError(f"{part.target}: a part of kind {part.kind} is no change of a weight.")
    if part.magnitude is None:
        return part.scale * part.b.double() @ part.a.double()
    return change_of(program, part)


def change_of(program: Base, part: Part) -> Tensor:
    """The change of a stored tensor by a part that depends on its numbers, in float64: of a matrix
    or more `[out, in]`, of what is trained itself in its own shape.

    Raises:
        ArtifactError: it is no change of a tensor, or (BaseNeededError) the numbers are not known.
    """
    name = program.tensors.stored(part.target)
    stored = values(program, name, f"the change of {part.target}").double()
    if isinstance(part, Trained):
        return part.values.double() - stored
    if isinstance(part, Rows):
        change = torch.zeros_like(stored)
        change[part.ids] = part.values.double() - stored[part.ids]
        return change
    sites = program.sites.by_weight.get(name, [])
    in_out = any(isinstance(s, LinearSite) and s.in_out for s in sites)
    weight = stored.mT if in_out else stored.flatten(1)
    if isinstance(part, Formula):
        return part.change(weight)
    if isinstance(part, Scaling):
        vector = part.vector.double() - 1
        return weight * (vector[:, None] if part.side == "out" else vector)
    if not isinstance(part, LowRank) or part.magnitude is None:
        raise ArtifactError(f"{part.target}: a part of kind {part.kind} is no change of a weight.")
    moved = weight + (part.scale * part.b.double() @ part.a.double()).reshape(weight.shape)
    return part.magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight


def _site(program: Base, part: Part) -> WeightSite:
    stored = program.tensors.stored(part.target)
    sites = program.sites.by_weight.get(stored, [])
    lookup = isinstance(part, LowRank) and part.lookup
    site = next((s for s in sites if isinstance(s, EmbeddingSite) == lookup), None)
    if site is None:
        raise ArtifactError(f"no call of this model multiplies by {part.target!r}.")
    return site


def worst(lost: Mapping[str, float]) -> Sequence[tuple[str, float]]:
    """The parameters that lost most, at most three."""
    return sorted(lost.items(), key=lambda i: -i[1])[:3]
