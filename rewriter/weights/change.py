"""What branches change of a weight, all together and exactly, without folding them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..branches.branch import Branch, Delta, InputScale, OutputScale, RowScale, Scale
from ..branches.input_map import InputMap
from .verdict import alone_in


@torch.no_grad()
def change_of(
    branches: Sequence[Branch], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What folding branches would add to a weight and its bias, in float64.

    Args:
        branches: of one weight, in the order of composition (row scale, deltas, output scale; the
            places of what changes inputs do not matter).
        weight: `[count * out, in]`, the whole of a fused one.
        bias: of the weight, or None.

    Returns:
        The change of the weight, and of the bias where there is any.
    """
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    old, own = weight.detach().to(wide), [alone_in(b, wide) for b in branches]
    if all(isinstance(b, Delta) for b in own):  # nothing that has to be subtracted again
        return sum(
            (b.full_delta() for b in own if isinstance(b, Delta)), torch.zeros_like(old)
        ), None
    moved, old_bias = old, None if bias is None else bias.detach().to(wide)
    new_bias = old_bias
    for branch in own:
        if isinstance(branch, Delta | RowScale):
            moved = moved + branch.full_delta()
        if isinstance(branch, RowScale):
            moved = moved * branch.full_rows(branch.shape.stored(old))[:, None]
        elif isinstance(branch, OutputScale):
            moved = moved * branch.full_scale()[:, None]
            new_bias = None if new_bias is None else new_bias * branch.full_scale()
    for branch in reversed(own):  # the last one is next to the weight
        if isinstance(branch, InputScale):
            moved = moved * branch.shape.columns(branch.full_scale(), moved)
        elif isinstance(branch, InputMap):
            moved = branch.full_adjoint(moved)
    scaled = any(isinstance(b, Scale) and not isinstance(b, InputScale) for b in own)
    change = None if new_bias is None or old_bias is None or not scaled else new_bias - old_bias
    return moved - old, change
