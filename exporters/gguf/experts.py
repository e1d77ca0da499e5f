"""LoRA of experts in GGUF files: gates and what they open are tensors of their own there, and one
tensor in transformers, `[experts, 2 * inner, in]`, the gates first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ...rewriter.errors import ArtifactError
from ...rewriter.parts.parts import LowRank
from ..base import Base
from .names import Names


def joined(names: Names, low: Mapping[str, LowRank]) -> list[LowRank]:
    """One part for each weight.

    Args:
        names: of the weights.
        low: name in the file -> part, whose rows are those of the file's tensor.
    """
    done = [p for p in low.values() if p.target not in names.halves]
    for target in dict.fromkeys(p.target for p in low.values() if p.target in names.halves):
        gate, up = (low.get(n) for n in names.halves[target])
        first = gate or up
        if first is not None:
            none = replace(first, b=torch.zeros_like(first.b))
            done.append(_stacked(gate or none, up or none))
    return done


def _stacked(gate: LowRank, up: LowRank) -> LowRank:
    """The rows of both; ranks are shared where one `a` serves both."""
    if gate.scale == up.scale and torch.equal(gate.a, up.a):
        return replace(gate, b=torch.cat([gate.b, up.b], 1))
    above = functional.pad(gate.b, (0, up.a.shape[1]))
    below = functional.pad(up.b * (up.scale / gate.scale), (gate.a.shape[1], 0))
    return replace(gate, a=torch.cat([gate.a, up.a], 1), b=torch.cat([above, below], 1))


def parted(program: Base, names: Names, part: LowRank) -> Iterator[tuple[str, LowRank]]:
    """Name in the file -> part, each with the ranks that its rows use.

    Raises:
        ArtifactError: the rows are no gates with what they open below.
    """
    require_gates_first(program, part.target)
    for name, rows in zip(names.halves[part.target], part.b.chunk(2, 1), strict=True):
        used = rows.flatten(0, 1).any(0)
        if used.any():
            yield name, replace(part, a=part.a[:, used], b=_columns(rows, used))


def _columns(rows: Tensor, used: Tensor) -> Tensor:
    return rows[:, :, used].contiguous()


def require_gates_first(program: Base, target: str) -> None:
    """Raises ArtifactError unless the first half of the rows of a tensor are gates."""
    for site in program.sites.by_weight.get(program.tensors.stored(target), []):
        size = len(site.features or ())
        start = 0 if site.role == "ffn.gate" else size
        if site.features != tuple(range(start, start + size)):
            raise ArtifactError(
                f"{target}: its gates are not the first half of its rows, as GGUF files of known "
                "architectures have them. Fold it, or write PEFT's format."
            )
