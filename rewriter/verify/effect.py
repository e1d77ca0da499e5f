"""How much of what adapters do a rewriting keeps.

Rounding explains differences up to a network's own sensitivity, which in bfloat16 may be more than
an adapter does. So a pass that rewrites or folds branches is also held to what they contribute:
the outputs with them, against the outputs with each of them doing nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..measure.compare import floats
from ..measure.witness import Witness
from .silence import silenced

_BLOCK = 1 << 16
"""Elements that are looked at at a time: as float64, outputs are large."""
SHARE = 0.1
"""Share of what branches contribute that a rewriting may change in any case."""


def effect(
    before: Witness, after: Witness, inputs: Mapping[str, Tensor],
    silent: Collection[int] = (), resting: Any = None,
) -> dict[str, float]:  # fmt: skip
    """What the branches that a pass has folded or rewritten contribute, and what is left of it.

    Args:
        before, after: the programs.
        inputs: that they are called with.
        silent: which outputs tell nothing.
        resting: the outputs without these branches, where they are known already.

    Returns:
        `effect`, the norm of what the branches add to the outputs, and `error`, that of the
        difference between the programs, both relative to the outputs' norm; `kept`, how much of
        the former is left, where 1 is all and 0 nothing. Empty if there is nothing to tell.
    """
    paths = _rewritten(before, after)
    if not paths:
        return {}
    full, without = (_heard(w.outputs(inputs), silent) for w in (before, after))
    if resting is None:
        with silenced(before.gm, paths):
            resting = before.call(before.completed(inputs))
    bare = _heard(resting, silent)
    square = error = product = 0.0
    for each in zip(full, without, bare, strict=True):
        size, *sums = _sums(*(t.reshape(-1) for t in each))
        one, two, three = (total / (size or 1.0) for total in sums)
        square, error, product = square + one, error + two, product + three
    if not square:
        return {}
    return {"effect": math.sqrt(square), "error": math.sqrt(error), "kept": product / square}


def _sums(x: Tensor, y: Tensor, z: Tensor) -> list[float]:
    """Sums over all elements in float64: of `x x`, `(x - z)^2`, `(y - x)^2`, `(y - z)(x - z)`."""
    sums = [0.0] * 4
    for parts in zip(*(t.split(_BLOCK) for t in (x, y, z)), strict=True):
        a, b, c = (torch.nan_to_num(t.double(), 0.0, 0.0, 0.0) for t in parts)
        added, kept, off = a - c, b - c, b - a
        for i, (u, v) in enumerate(((a, a), (added, added), (off, off), (kept, added))):
            sums[i] += float(u @ v)
    return sums


def _heard(output: Any, silent: Collection[int]) -> list[Tensor]:
    return floats([t for i, t in enumerate(pytree.tree_leaves(output)) if i not in silent])


def _rewritten(before: Witness, after: Witness) -> list[str]:
    """Paths of the branches that are gone; if none is, of all."""
    there = [a.path for a in before.program.attachments]
    left = {a.path for a in after.program.attachments}
    gone = [path for path in there if path not in left]
    return gone or there
