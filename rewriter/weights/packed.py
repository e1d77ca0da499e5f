"""Small integers in bytes, and columns in groups."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PassError


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 `[..., count]` -> uint8 `[..., bytes]`, the first value in the lowest bits."""
    each = 8 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    return (padded.unflatten(-1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undoes `pack`: uint8 `[..., bytes]` -> uint8 `[..., count]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count]


def grouped(rows: Tensor, group: int) -> Tensor:
    """`[out, in]` -> `[out, groups, group]`, padded with zeros."""
    missing = -rows.shape[1] % group
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, group))


def whole_groups(index: Tensor, group: int, size: int) -> Tensor:
    """The groups that an index of columns consists of, in its order.

    Raises:
        PassError: it parts a group, or puts columns behind a last group that is shorter.
    """
    count = -(-size // group)
    groups = index[:: 1 if group == 1 else group] // group if len(index) else index
    columns = (groups[:, None] * group + torch.arange(group, device=index.device)).flatten()
    short = bool((groups[:-1] == count - 1).any()) and size % group != 0
    if short or not torch.equal(columns[columns < size], index):
        raise PassError(
            f"groups of {group} columns share what they are stored with, so only whole groups can "
            "be taken. Choose columns by groups, or take them before the weight is packed."
        )
    return groups
