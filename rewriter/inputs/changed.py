"""Inputs that differ at one place of an axis, for trials of what that place influences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def altered(tensor: Tensor, axes: Sequence[int], place: int) -> Tensor:
    """Other values at one place of the given axes: negated and shifted numbers; ids in another
    order, or other ids where that changes nothing. Masks stay."""
    if not axes or tensor.dtype == torch.bool:
        return tensor
    moved = tensor.clone()
    for axis in axes:
        part = moved.select(axis, place)
        if tensor.is_floating_point():
            part.copy_(1 - part)
            continue
        rolled = part.flatten().roll(1).view_as(part)
        most = int(tensor.max())
        if torch.equal(rolled, part) and most > 1:
            rolled = (part + 1) % (most + 1)
        part.copy_(rolled)
    return tensor if torch.equal(moved, tensor) else moved


def levelled(tensor: Tensor, axes: Sequence[int], place: int) -> Tensor:
    """The first number everywhere at one place of the given axes: what a sum over ids in another
    order does not show."""
    if not axes or tensor.dtype == torch.bool:
        return tensor
    moved = tensor.clone()
    for axis in axes:
        part = moved.select(axis, place)
        part.copy_(part.flatten()[0].clone().expand_as(part))
    return tensor if torch.equal(moved, tensor) else moved
