"""Branches of several adapters as one: every sample of a batch has its own, by an id.

What each sample needs is gathered by its id: the factors of a low-rank branch, the vector of a
scale, the rows of a prefix or prompt. Members of other kinds each compute their formula for the
whole batch, of which every sample takes one of the results: whatever formulas and options are, at
the cost of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .branch import Axes, Branch, Delta, InputScale, OutputScale, RowScale, Scale, Serial
from .prompts import KeyValue, Tokens
from .samples import Samples
from .shapes import ExpertsShape

Factors = tuple[Tensor, Tensor, float]
"""`(a [rank, in], b [out, rank], s)`."""

_REASON = "which adapter acts is an input"


class Rowwise(Branch):
    """Base: the members of one slot at a site; None has no branch there.

    Attributes:
        samples: where samples lie in what the branch reads and gives.
    """

    not_foldable = _REASON

    results: Tensor

    def __init__(self, members: Sequence[Branch | None], samples: Samples) -> None:
        super().__init__()
        self.samples = samples
        fixed = [_constant(m) for m in members if m is not None]
        self.kinds = tuple(dict.fromkeys(type(m).__name__ for m in fixed))
        self.count, device = len(fixed), next(fixed[0].buffers()).device
        self.register_buffer("results", _results(members, device), False)
        self._keep(fixed)

    def _keep(self, members: Sequence[Branch]) -> None:
        self.members = nn.ModuleList(members)

    def chosen(self, y: Tensor, ids: Tensor, *args: Any, **operands: Any) -> Tensor:
        """Every sample's own member of `args`; y, index for index, for those that have none."""
        results = [y, *(member(*args, **operands) for member in self.members)]
        axis, places = self.samples.axis, y.shape[self.samples.axis]
        own = self.samples.spread(self.results[ids], places)
        rows = torch.arange(places, device=y.device)
        return torch.cat(results, axis).index_select(axis, own * places + rows)

    def describe(self) -> str:
        return f"{self.count} adapters, {', '.join(self.kinds)}"


class RowwiseDelta(Rowwise, Delta):
    """What each sample's own member adds; nothing where it has none."""

    def forward(self, x: Tensor, *linear: Any, ids: Tensor, **operands: Any) -> Tensor:
        """`x` with samples as `samples` says; `ids [batch]`, int64."""
        del linear
        nothing = torch.zeros_like(self.members[0](x, **operands))
        return self.chosen(nothing, ids, x, **operands)


class RowwiseInputScale(Rowwise, InputScale):
    """Each sample's own scale of what a weight reads."""

    scales: Tensor

    def _keep(self, members: Sequence[Branch]) -> None:
        if isinstance(members[0].shape, ExpertsShape):
            super()._keep(members)
            return
        own = [m.full_scale() for m in members if isinstance(m, Scale)]
        table = torch.stack([torch.ones_like(own[0]), *own])
        self.members = nn.ModuleList()
        self.register_buffer("scales", table.detach(), False)

    def forward(self, x: Tensor, *, ids: Tensor, **operands: Any) -> Tensor:
        """`x` with samples as `samples` says; `ids [batch]`, int64."""
        if len(self.members):
            return self.chosen(x, ids, x, **operands)
        last = self.features_last(x)
        places = last.shape[self.samples.axis]
        own = self.samples.spread(self.scales[self.results[ids]], places)
        behind = self.shape.along(self.scales[0], last).shape
        between = last.dim() - self.samples.axis - 1 - len(behind)
        scaled = last * own.view(places, *[1] * between, *behind)
        return self.features_back(scaled.to(x.dtype))


class RowwiseOutputScale(RowwiseInputScale, OutputScale):
    """Each sample's own scale of what a weight gives."""

    slot = OutputScale.slot
    reads = writes = "out"


class RowwiseLowRank(Delta):
    """`y_i = s_k (x_i A_k^T) B_k^T` for a sample with the id k: `a [n + 1, rank, in]`,
    `b [n + 1, out, rank]`, `scale [n + 1]`; the last entry is zero, and smaller ranks are padded.
    """

    not_foldable = _REASON
    fuses_reads = True
    axes: ClassVar[Axes] = {
        "a": ("adapter", "rank", "in"),
        "b": ("adapter", "out", "rank"),
        "scale": ("adapter",),
        "ids": ("batch",),
    }

    a: Tensor
    b: Tensor
    scale: Tensor

    def __init__(self, members: Sequence[Factors | None], samples: Samples) -> None:
        super().__init__()
        present = [m for m in members if m is not None]
        rank = max(a.shape[0] for a, _, _ in present)
        a, b, _ = present[0]
        self.samples = samples
        # They follow from the members' own tensors, which an artifact holds already.
        self.register_buffer("a", a.new_zeros(len(members) + 1, rank, a.shape[1]), False)
        self.register_buffer("b", b.new_zeros(len(members) + 1, b.shape[0], rank), False)
        self.register_buffer("scale", a.new_zeros(len(members) + 1), False)
        for index, member in enumerate(members):
            if member is not None:
                a, b, self.scale[index] = member
                self.a[index, : len(a)], self.b[index, :, : len(a)] = a, b

    def branch(self, x: Tensor, ids: Tensor) -> Tensor:
        """`ids [batch]`, int64; x has samples where `samples` says."""
        rows, inner, b = self._narrowed(x, ids)
        return self.samples.back((inner @ b.mT).view(*rows.shape[:-1], -1))

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **reads: Tensor
    ) -> Tensor:
        """As of a `Delta`; lowered, the products are added to the linear's own result."""
        if weight is None or x.requires_grad:
            return super().forward(x, weight, bias, **reads)
        y = F.linear(x, weight, bias)
        own = self.samples.first(y, reads["ids"].shape[0])
        if own.dim() < 3 or self.samples.order != "alone" or not own.is_contiguous():
            return y + self.branch(x, **reads)  # where own is no view of y
        _, inner, b = self._narrowed(x, reads["ids"])
        own.flatten(1, -2).baddbmm_(inner.to(y.dtype), b.mT.to(y.dtype))
        return y

    def _narrowed(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x with samples in front, `s x A^T [batch, places, rank]`, and B, of each."""
        rows = self.samples.first(x, ids.shape[0])
        flat = rows.flatten(1, -2) if rows.dim() > 2 else rows[:, None]
        a, b, scale = (t[ids].to(x.dtype) for t in (self.a, self.b, self.scale))
        return rows, flat @ a.mT * scale[:, None, None], b

    def describe(self) -> str:
        return f"{len(self.a) - 1} adapters, rank={self.a.shape[1]}"


class RowwiseRowScale(RowScale):
    """Each sample's own magnitudes of a linear's rows, which follow from the weight as it is (one
    vector a member), and its own low-rank part below them."""

    not_foldable = _REASON

    results: Tensor

    def __init__(self, members: Sequence[RowScale | None], samples: Samples) -> None:
        super().__init__()
        self.samples = samples
        self.below = RowwiseLowRank([m and constant_factors(m) for m in members], samples)
        fixed = [_constant(m) for m in members if m is not None]
        self.members = nn.ModuleList(fixed)
        self.register_buffer("results", _results(members, self.below.a.device), False)

    def forward(
        self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, **reads: Tensor
    ) -> Tensor:
        """`y` is `linear(x, weight, bias)`; reads `ids [batch]`, int64."""
        ids = reads["ids"]
        rows: list[Any] = [m.full_rows(weight) for m in self.members]  # pyright: ignore
        table = torch.stack([torch.ones_like(rows[0]), *rows])[self.results[ids]]
        last, axis = self.features_last(y), self.samples.axis
        own = last + self.spread_last(self.below.branch(self.features_last(x), ids), 0.0)
        between = [1] * (last.dim() - axis - 2)
        c = self.samples.spread(table, last.shape[axis]).view(last.shape[axis], *between, -1)
        scaled = own * c if bias is None else own * c + (1 - c) * bias
        return self.features_back(scaled.to(y.dtype))

    def describe(self) -> str:
        return self.below.describe()


class RowwiseSerial(Rowwise, Serial):
    """Each sample's own branch behind a sublayer."""

    def forward(self, h: Tensor, skip: bool = True, **reads: Tensor) -> Tensor:
        """`h` with samples as `samples` says; reads `ids [batch]`, int64."""
        ids = reads["ids"]
        return self.chosen(h if skip else torch.zeros_like(h), ids, h, skip)


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


class RowwiseTokens(Tokens):
    """Each sample's own prompt, of one length, and of every member."""

    not_foldable = _REASON

    prompts: Tensor

    def __init__(self, members: Sequence[Tokens]) -> None:
        super().__init__(members[0].length)
        with torch.no_grad():
            self.register_buffer("prompts", torch.stack([m.rows() for m in members]), False)

    def rows(self, ids: Tensor) -> Tensor:
        """`[batch, length, width]` for `ids [batch]`, int64."""
        return self.prompts[ids]

    def describe(self) -> str:
        return f"{len(self.prompts)} adapters, length={self.length}"


_SLOTS: dict[str, type[Rowwise] | type[RowwiseRowScale]] = {
    "delta": RowwiseDelta,
    "input_scale": RowwiseInputScale,
    "output_scale": RowwiseOutputScale,
    "row_scale": RowwiseRowScale,
    "serial": RowwiseSerial,
}


def rowwise(members: Sequence[Any], samples: Samples) -> Branch:
    """The branch of a slot in which each sample has its own member."""
    slot = next(m.slot for m in members if m is not None)
    return _SLOTS[slot](members, samples)


def unlike(one: Branch, other: Branch) -> str:
    """Why two branches of one slot cannot be members of one; empty if they can."""
    for kind in (KeyValue, Tokens):
        if isinstance(one, kind) and isinstance(other, kind):
            same = one.length == other.length
            return "" if same else f"its length is {other.length}, that of the first {one.length}"
    if isinstance(one, RowScale) and (one.factors() is None or other.factors() is None):  # pyright: ignore
        return "a row scale is chosen by sample at linears, with a low-rank part, alone"
    return "" if one.slot in _SLOTS else f"a {one.slot} branch cannot be chosen by sample"


def constant_factors(branch: Any) -> Factors | None:
    """The factors of a low-rank branch; None if it has none."""
    factors = branch.factors() if isinstance(branch, Delta | RowScale) else None
    return factors and (factors[0].detach(), factors[1].detach(), factors[2])


def _results(members: Sequence[Branch | None], device: torch.device) -> Tensor:
    """Id -> 1 + the place among the members that are there; 0 where there is none."""
    there = [k for k, m in enumerate(members) if m is not None]
    places = [there.index(k) + 1 if k in there else 0 for k in range(len(members))]
    return torch.tensor([*places, 0], device=device)


def _constant(member: Branch) -> Any:
    """A copy for inference, whose tensors are no part of a state: an artifact holds the member."""
    fixed = copy.deepcopy(member).eval()
    for module in fixed.modules():
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
            module.register_buffer(name, None if tensor is None else tensor.detach(), False)
    return fixed
