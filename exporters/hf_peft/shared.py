"""PEFT's types whose adapters share tensors: written where the parts still are of that form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...rewriter.branches.parts import Part, Trained
from ...rewriter.branches.shared_parts import Vera, shared
from ...rewriter.program.sites import LinearSite
from ..base import Base
from .config import PREFIX
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
    if len(veras) == len(own) and shared(veras, ("down", "up")):
        config, tensors = _vera(veras)
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


def _given(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if t is not None}


def modules_of(parts: Sequence[Part]) -> Collection[str]:
    """The modules that the parts stand beside."""
    return {p.target.removesuffix(".weight") for p in parts if not isinstance(p, Trained)}
