"""PEFT's types whose adapters share tensors: VBLORA read, and VERA and VBLORA written where parts
still are of that form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError
from ...rewriter.parts.parts import Part, Trained
from ...rewriter.parts.shared_parts import Mixture, Vera, bank_part, shared
from ...rewriter.program.sites import LinearSite
from ..base import Base
from .changes import weight_of
from .config import PREFIX, Config, by_module
from .soft_prompts import Written


def shared_form(program: Base, parts: Sequence[Part]) -> Written | None:
    """Config (without its modules) and tensors of a type that shares tensors, or None if no such
    type holds these parts: they are of another form by now, or beside what is no linear."""
    own = [p for p in parts if not isinstance(p, Trained)]
    modules = {p.target.removesuffix(".weight") for p in own}
    beside = any(p.target.rpartition(".")[0] in modules for p in parts if isinstance(p, Trained))
    sites = [_linear(program, p.target) for p in own]
    if not own or beside or not all(sites):
        return None
    veras = [p for p in own if isinstance(p, Vera) and p.whole()]
    mixed = [p for p in own if isinstance(p, Mixture) and p.whole()]
    if len(veras) == len(own) and shared(veras, ("down", "up")):
        config, tensors = _vera(veras)
    elif len(mixed) == len(own) and shared(mixed, ("bank",)) and _alike(mixed):
        config, tensors = _vblora(mixed)
    else:
        return None
    turned = all(s.in_out for s in sites if s is not None)
    return config | ({"fan_in_fan_out": True} if turned else {}), tensors


def _linear(program: Base, name: str) -> LinearSite | None:
    sites = program.sites.by_weight.get(program.tensors.stored(name), [])
    return next((s for s in sites if isinstance(s, LinearSite)), None)


def _vera(parts: Sequence[Vera]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """VERA: vectors, and the first rows and columns of two matrices that are as wide as needed."""
    first = parts[0]
    width, height = (max(sizes) for sizes in zip(*(_sizes(p) for p in parts), strict=True))
    config = {
        "peft_type": "VERA", "r": len(first.a), "save_projection": True, "projection_prng_key": 0,
        "vera_dropout": max(p.dropout for p in parts),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for part in parts:
        path = f"{PREFIX}{part.target.removesuffix('.weight')}"
        tensors |= _given({f"{path}.vera_lambda_b": part.vector, f"{path}.vera_lambda_d": part.d})
    down, up = first.down, first.up
    if down is not None and up is not None:
        tensors["base_model.vera_A"] = down[:, :width].contiguous()
        tensors["base_model.vera_B"] = up[:height].contiguous()
    return config, tensors


def _sizes(part: Vera) -> tuple[int, int]:
    return part.a.shape[1], part.b.shape[0]


def _alike(parts: Sequence[Mixture]) -> bool:
    """Whether all have the rank and k that one config says, and are baked or none is."""
    return len({(len(p.a), p.topk, p.places_a is None, p.places_b is None) for p in parts}) == 1


def _vblora(parts: Sequence[Mixture]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """VBLORA: logits, or of baked parts places and all but the last weight of each mixture."""
    first, bank = parts[0], parts[0].bank
    if bank is None:
        return {}, {}
    config = {
        "peft_type": "VBLORA", "r": len(first.a), "num_vectors": bank.shape[0],
        "vector_length": bank.shape[1], "topk": first.topk,
        "save_only_topk_weights": first.places_a is not None,
        "vblora_dropout": max(p.dropout for p in parts),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {"base_model.vblora_vector_bank": bank}
    for part in parts:
        path = f"{PREFIX}{part.target.removesuffix('.weight')}.vblora_logits"
        for side, logits, places in (
            ("A", part.logits_a, part.places_a), ("B", part.logits_b, part.places_b),
        ):  # fmt: skip
            key = f"{path}_{side}"
            if places is None or logits is None:
                tensors |= _given({key: logits})
                continue
            tensors[f"{key}_topk_indices"] = places.to(_places_dtype(len(bank)))
            tensors[f"{key}_topk_weights"] = logits.softmax(-1)[..., :-1].contiguous()
    return config, tensors


def _places_dtype(count: int) -> torch.dtype:
    """What PEFT stores places among so many vectors as."""
    return torch.uint8 if count < 1 << 8 else torch.int16 if count < 1 << 15 else torch.int32


_LOGITS = ("vblora_logits_A", "vblora_logits_B")


def vector_bank(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """VBLORA: mixtures of the vectors of a bank, by all logits or by the largest alone."""
    for word, usual in (("r", 4), ("num_vectors", 256), ("vector_length", 256)):
        config.take(word, usual)
    config.take("init_vector_bank_bound", 0.02), config.take("init_logits_std", 0.1)
    topk, baked = config.take("topk", 2), config.take("save_only_topk_weights", False)
    dropout = float(config.take("vblora_dropout", 0.0, int, float))
    bank = tensors.pop("vblora_vector_bank", None)
    ends = ("_topk_indices", "_topk_weights") if baked else ("",)
    leaves = [f"{name}{end}" for name in _LOGITS for end in ends]
    parts: list[Part] = []
    for path, own in by_module(tensors, leaves).items():
        for leaf in own:
            del tensors[f"{path}.{leaf}"]
        name = weight_of(program, path, config)
        if bank is None or own.keys() != set(leaves) or bank.dim() != 2:
            raise ArtifactError(
                f"{config.where}: {path} has {', '.join(own)}, and it takes {', '.join(leaves)} "
                "and a vblora_vector_bank. The file is not whole; save the adapter again."
            )
        pairs = [_largest(own, side, len(bank), topk, config, path) if baked else (own[side], None)
                 for side in _LOGITS]  # fmt: skip
        (logits_a, places_a), (logits_b, places_b) = pairs
        places = None if places_a is None or places_b is None else (places_a, places_b)
        part = bank_part(name, (logits_a, logits_b), places, bank, topk, dropout)
        _require_fit(program, part, config)
        parts.append(part)
    return parts


def _largest(
    own: Mapping[str, Tensor], side: str, count: int, topk: int, config: Config, path: str
) -> tuple[Tensor, Tensor]:
    """Logits and places of the k largest; the last weight is what is left of 1."""
    places, weights = own[f"{side}_topk_indices"], own[f"{side}_topk_weights"].float()
    least, most = (int(v) for v in torch.aminmax(places.long()))
    if places.shape[-1] != topk or weights.shape[-1] != topk - 1 or least < 0 or most >= count:
        raise ArtifactError(
            f"{config.where}: {path}.{side} names places {least} to {most}, {places.shape[-1]} for "
            f"topk={topk}, in a bank of {count}. The files do not belong together; save it again."
        )
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    return weights.clamp(min=torch.finfo(weights.dtype).tiny).log(), places


def _require_fit(program: Base, part: Mixture, config: Config) -> None:
    stored = program.base.base_tensors()[program.tensors.stored(part.target)]
    site = _linear(program, part.target)
    sizes = tuple(stored.shape[::-1] if site is not None and site.in_out else stored.shape)
    if site is None or sizes != (len(part.b), part.a.shape[1]):
        raise ArtifactError(
            f"{config.where}: the factors of {part.target} are for [{len(part.b)}, "
            f"{part.a.shape[1]}], and it is {list(sizes)}. Use the base that the adapter was "
            "trained on."
        )


def _given(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if t is not None}


def modules_of(parts: Sequence[Part]) -> Collection[str]:
    """The modules that the parts stand beside."""
    return {p.target.removesuffix(".weight") for p in parts if not isinstance(p, Trained)}
