"""AdapterHub's LoRA, DoRA, VeRA and (IA)3 as parts.

LoRA's change is `alpha / r B A`, or behind a gate `B A`. Of a fused projection the factors are in
groups, one for each of q, k, v that is adapted. (IA)3 scales what the layer gives, everywhere.
DoRA divides by the norm of `W + B A` whatever alpha is, and scales the layer's bias, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError
from ...rewriter.parts.parts import LowRank, Part, Scaling, Trained
from ...rewriter.program.sites import LinearSite
from .config import LORA, Options, options_of
from .leaves import Leaves, needed, popped
from .places import Places, sites_at
from .reading import File, gate_leaves, grouped

_FUSED = ("q", "k", "v")


def low_rank(options: Options, file: File, places: Places) -> list[Part]:
    """All tensors of the architecture `lora`."""
    options.take("leave_out", list)
    mode = options.take("composition_mode", str)
    if mode not in ("add", "scale"):
        raise options.refuse("composition_mode", "known are 'add' and 'scale'")
    vera = any(options.take(k, float, type(None)) is not None for k in ("vera_d", "vera_b"))
    shared = file.take("shared_parameters") if vera else {}
    projections = {k: t for leaves in shared.values() for k, t in leaves.items()}
    parts: list[Part] = []
    for path, leaves in file.take("loras").items():
        where, name = f"{file.where}: {path}", places.weight(path)
        own = dict(leaves)
        if mode == "scale":
            parts.append(_scaling(options, places, name, own, where))
        else:
            parts += _product(options, places, name, own, projections, where)
        if own:
            raise ArtifactError(
                f"{where}: the key ...{next(iter(own))!r} is not understood. Save the adapter "
                "again."
            )
    return parts


def _scaling(options: Options, places: Places, name: str, leaves: Leaves, where: str) -> Scaling:
    if options.take("use_gating", bool):
        raise options.refuse("use_gating", "scales have no gate here")
    options.take("r", int), options.take("use_dora", bool), options.take("dropout", float, int)
    vector = popped(leaves, "lora_B", where).flatten() * options.take("alpha", int, float)
    enabled, out = _enabled(options, places, name, len(vector), where)
    whole = vector.new_ones(out)
    whole[enabled] = vector
    return Scaling(name, whole, "out")


def _product(
    options: Options, places: Places, name: str, leaves: Leaves, shared: Leaves, where: str
) -> list[Part]:
    dropout = float(options.take("dropout", float, int))
    gate: Leaves = {}
    if options.take("use_gating", bool):
        gate = gate_leaves(leaves, "gate.", where)
    a, b, scale = _factors(options, leaves, shared, where)
    scale, groups = 1.0 if gate else scale, len(a) // b.shape[1]
    enabled, out = _enabled(options, places, name, len(b), where)
    if gate and len(gate["gate"]) != 1:
        raise options.refuse("use_gating", "a fused projection has one gate here")
    if len(enabled) == out and groups == 1:
        spread = b
    else:
        spread = b.new_zeros(out, len(a))
        spread[enabled] = torch.block_diag(*b.chunk(groups))
    part = LowRank(name, a, spread, scale, None, False, dropout, **gate)
    if not options.take("use_dora", bool):
        return [part]
    return _magnitudes(options, places, part, popped(leaves, "m.weight", where).flatten(), where)


def factors_alone(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> dict[str, LowRank]:
    """The changes that files tell without their model, by the module's path in them: LoRA's and
    VeRA's, but for those behind a gate and those with magnitudes."""
    found: dict[str, LowRank] = {}
    for options in options_of(data, where):
        if options.architecture != LORA or options.take("composition_mode", str) != "add":
            continue
        if options.take("use_gating", bool) or options.take("use_dora", bool):
            continue
        file = grouped(tensors, str(data.get("name")), where)
        shared = {k: t for own in file.take("shared_parameters").values() for k, t in own.items()}
        for path, leaves in file.take("loras").items():
            a, b, scale = _factors(options, dict(leaves), shared, where)
            spread = torch.block_diag(*b.chunk(len(a) // b.shape[1]))
            found[path] = LowRank(path, a, spread, scale)
    return found


def _factors(
    options: Options, leaves: Leaves, shared: Leaves, where: str
) -> tuple[Tensor, Tensor, float]:
    """The factors of a module, of fused projections in groups, and what scales them."""
    rank = options.take("r", int)
    a, b = _vera(leaves, shared, where) if shared else (
        popped(leaves, "lora_A", where), popped(leaves, "lora_B", where)
    )  # fmt: skip
    groups = len(a) // rank if rank > 0 else 0
    if len(a) != groups * rank or b.shape[1] != rank or groups not in (1, 2, 3):
        raise ArtifactError(
            f"{where}: the config's rank is {rank}, and the tensors are {list(a.shape)} and "
            f"{list(b.shape)}. The files do not belong together; save the adapter again."
        )
    return a, b, float(options.take("alpha", int, float)) / rank


def _vera(leaves: Leaves, shared: Leaves, where: str) -> tuple[Tensor, Tensor]:
    """`B_v B D A`: two matrices of the site around two that all share."""
    a, b = needed(shared, "lora_A", where), needed(shared, "lora_B", where)
    return popped(leaves, "vera_D", where) @ a, popped(leaves, "vera_B", where) @ b


def _magnitudes(
    options: Options, places: Places, part: LowRank, m: Tensor, where: str
) -> list[Part]:
    """`m / |W + B A| (W x + b + s B A x)`, as a DoRA whose norm is of `W + s B A`, with the bias
    as it is scaled."""
    (site, *others) = sites_at(places.program, part.target)
    if part.gate is not None or others or not isinstance(site, LinearSite):
        raise options.refuse("use_dora", "magnitudes are read without gates, beside whole linears")
    base = places.program.base.base_tensors()
    weight = base[site.weight].detach().float()
    weight = weight.mT if site.in_out else weight
    change = part.b.float() @ part.a.float()
    norm = (weight + change).norm(dim=1)
    if part.scale != 1:
        m = (m.float() / norm * (weight + part.scale * change).norm(dim=1)).to(m.dtype)
    scaled = LowRank(part.target, part.a, part.b, part.scale, m, False, part.dropout)
    if site.bias is None:
        return [scaled]
    factor = m.float() / (weight + part.scale * change).norm(dim=1)
    return [scaled, Trained(site.bias, base[site.bias].detach().float() * factor)]


def _enabled(
    options: Options, places: Places, name: str, count: int, where: str
) -> tuple[Tensor, int]:
    """Which outputs of a weight are adapted, and how many it has: all, or those of some of q, k
    and v of a fused projection."""
    sites = sites_at(places.program, name)
    if not sites:
        raise ArtifactError(f"{where}: no call of this model multiplies by {name!r}.")
    stored = places.program.base.base_tensors()[sites[0].weight]
    out = stored.numel() // sites[0].matrices[2]
    chosen = set(options.take("attn_matrices", list))
    thirds = [i for i, kind in enumerate(_FUSED) if kind in chosen]
    if count == out:
        return torch.arange(out), out
    if out % 3 or count != len(thirds) * (out // 3):
        raise ArtifactError(
            f"{where}: the adapter has {count} outputs, and {name} {out}. Use the base that it was "
            "trained on."
        )
    each = torch.arange(out).view(3, -1)
    return each[thirds].flatten(), out
