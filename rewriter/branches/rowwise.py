"""Branches of several adapters as one: every sample of a batch has its own, by an id.

Each member computes its formula for the whole batch, and every sample takes one of the results:
whatever the members' formulas and options are, at the cost of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .branch import Branch, Delta, InputScale, KeyValue, OutputScale, Serial

_REASON = "which adapter acts is an input"


class Rowwise(Branch):
    """Base: the members of one slot at a site; None has no branch there.

    Attributes:
        place: the axis of the samples in what the branch reads and gives.
    """

    not_foldable = _REASON

    results: Tensor

    def __init__(self, members: Sequence[Branch | None], place: int) -> None:
        super().__init__()
        self.place = place
        there = [k for k, m in enumerate(members) if m is not None]
        self.members = nn.ModuleList(_constant(m) for m in members if m is not None)
        results = [there.index(k) + 1 if k in there else 0 for k in range(len(members))]
        tensors = (*self.members.parameters(), *self.members.buffers())
        self.register_buffer(
            "results", torch.tensor([*results, 0], device=tensors[0].device), False
        )

    def chosen(self, y: Tensor, ids: Tensor, *args: Any, **operands: Any) -> Tensor:
        """Every sample's own member of `args`; y, index for index, for those that have none."""
        results = [y, *(member(*args, **operands) for member in self.members)]
        rows = torch.arange(y.shape[self.place], device=y.device)
        chosen = self.results[ids] * y.shape[self.place] + rows
        return torch.cat(results, self.place).index_select(self.place, chosen)

    def describe(self) -> str:
        kinds = dict.fromkeys(type(m).__name__ for m in self.members)
        return f"{len(self.members)} adapters, {', '.join(kinds)}"


class RowwiseDelta(Rowwise, Delta):
    """What each sample's own member adds; nothing where it has none."""

    def forward(self, x: Tensor, *linear: Any, ids: Tensor, **operands: Any) -> Tensor:
        """`x` with samples on an axis of their own; `ids [batch]`, int64."""
        del linear
        nothing = torch.zeros_like(self.members[0](x, **operands))
        return self.chosen(nothing, ids, x, **operands)


class RowwiseInputScale(Rowwise, InputScale):
    """Each sample's own scale of what a weight reads."""

    def forward(self, x: Tensor, *, ids: Tensor, **operands: Any) -> Tensor:
        """`x` with samples on an axis of their own; `ids [batch]`, int64."""
        return self.chosen(x, ids, x, **operands)


class RowwiseOutputScale(RowwiseInputScale, OutputScale):
    """Each sample's own scale of what a weight gives."""

    slot = OutputScale.slot
    reads = writes = "out"


class RowwiseSerial(Rowwise, Serial):
    """Each sample's own branch behind a sublayer."""

    def forward(self, h: Tensor, skip: bool = True, *, ids: Tensor, **reads: Tensor) -> Tensor:
        """`h` with samples on an axis of their own; `ids [batch]`, int64."""
        return self.chosen(h if skip else torch.zeros_like(h), ids, h, skip, **reads)


class RowwiseKeyValue(KeyValue):
    """Each sample's own rows in front of keys and values, of one length, and of every member."""

    not_foldable = _REASON

    key: Tensor
    value: Tensor

    def __init__(self, members: Sequence[KeyValue]) -> None:
        super().__init__(members[0].length)
        with torch.no_grad():
            rows = [m.rows() for m in members]
        for index, name in enumerate(("key", "value")):
            self.register_buffer(name, torch.stack([r[index] for r in rows]), False)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, length, kv_heads, width]` each, for `ids [batch]`, int64."""
        return self.key[ids], self.value[ids]

    def describe(self) -> str:
        return f"{len(self.key)} adapters, length={self.length}"


_SLOTS: dict[str, type[Rowwise]] = {
    "delta": RowwiseDelta,
    "input_scale": RowwiseInputScale,
    "output_scale": RowwiseOutputScale,
    "serial": RowwiseSerial,
}


def rowwise(members: Sequence[Branch | None], place: int) -> Rowwise:
    """The branch of a slot in which each sample has its own member."""
    slot = next(m.slot for m in members if m is not None)
    return _SLOTS[slot](members, place)


def unlike(one: Branch, other: Branch) -> str:
    """Why two branches of one slot cannot be members of one; empty if they can."""
    if isinstance(one, KeyValue) and isinstance(other, KeyValue):
        same = one.length == other.length
        return "" if same else f"its length is {other.length}, that of the first {one.length}"
    return "" if one.slot in _SLOTS else f"a {one.slot} branch cannot be chosen by sample"


def _constant(member: Branch) -> Branch:
    """A copy for inference, whose tensors are no part of a state: an artifact holds the member."""
    fixed = copy.deepcopy(member).eval()
    for module in fixed.modules():
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
            module.register_buffer(name, None if tensor is None else tensor.detach(), False)
    return fixed
