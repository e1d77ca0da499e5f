"""Several adapters of one kind as tables, of which every sample takes its own entries: where the
members are bottlenecks, or low-rank beside embeddings and convolutions.

Entry 0 of a table is zero, for samples that have no adapter; smaller ranks are padded with zeros,
which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.parts import Bottleneck, LowRank
from .bottleneck import ACTIVATIONS
from .branch import Axes, Branch, Delta, Serial
from .convolutions import ConvolutionShape
from .rowwise import Rowwise
from .samples import Samples
from .shapes import EmbeddingShape


class _LowRankTables(Rowwise, Delta):
    """`a [n, ..., rank, in]` of the members, and `b [n + 1, ..., out, rank]`, times their scales.

    Parts of several matrices have their number in front of the last two axes.
    """

    axes: ClassVar[Axes] = {"ids": ("batch",)}

    a: Tensor
    b: Tensor

    def _keep(self, members: Sequence[Branch]) -> None:
        parts: list[Any] = [m.part() for m in members]
        rank = max(p.a.shape[-2] for p in parts)
        a = torch.stack([F.pad(p.a, (0, 0, 0, rank - p.a.shape[-2])) for p in parts])
        b = [F.pad(p.b * p.scale, (0, rank - p.b.shape[-1])) for p in parts]
        self.register_buffer("a", self._laid(a), False)
        self.register_buffer("b", torch.stack([torch.zeros_like(b[0]), *b]), False)

    def _laid(self, a: Tensor) -> Tensor:
        """The first factors, laid out as `forward` reads them."""
        return a

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The entry of each sample in a, and in b."""
        entry = self.results[ids]
        return (entry - 1).clamp(min=0), entry


class RowwiseLookup(_LowRankTables):
    """`y = s_k B_k A_k[:, id]` for a sample with the adapter k; `a [n, size, rank]`."""

    def _laid(self, a: Tensor) -> Tensor:
        return a.mT.contiguous()

    def forward(self, x: Tensor, *linear: Any, ids: Tensor, **operands: Any) -> Tensor:
        """`x` with samples as `samples` says; `ids [batch]`, int64."""
        del linear, operands
        rows = self.samples.first(x, ids.shape[0])
        first, second = self.own(ids)
        flat = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
        dtype = getattr(self.shape, "dtype", self.b.dtype)
        y = self.a[first[:, None], flat].to(dtype) @ self.b[second].to(dtype).mT
        return self.samples.back(y.view(*rows.shape, -1))


class RowwiseConvolution(Rowwise, Delta):
    """A convolution by all members' `A`, with a channel a rank, of which each sample keeps its own
    (the others times zero), and one of kernel 1 by all their `B`: `a [..., n * rank, in]`,
    `b [..., out, n * rank]`, `own [n + 1, channels]`."""

    axes: ClassVar[Axes] = {"ids": ("batch",)}

    a: Tensor
    b: Tensor
    own: Tensor

    def _keep(self, members: Sequence[Branch]) -> None:
        parts: list[Any] = [m.part() for m in members]
        self.register_buffer("a", torch.cat([p.a for p in parts], -2), False)
        self.register_buffer("b", torch.cat([p.b * p.scale for p in parts], -1), False)
        ranks = self.a.new_tensor([p.a.shape[-2] for p in parts], dtype=torch.long)
        member = torch.arange(1, len(parts) + 1, device=ranks.device).repeat_interleave(ranks)
        entries = torch.arange(len(parts) + 1, device=ranks.device)
        own = entries[:, None] == member.repeat(parts[0].a.shape[:-2].numel())
        self.register_buffer("own", own, False)

    def forward(self, x: Tensor, *linear: Any, ids: Tensor, **operands: Any) -> Tensor:
        """`x [..., in, *places]` with samples as `samples` says; `ids [batch]`, int64."""
        del linear
        h, axis = self.shape.narrow(x, self.a, **operands), self.samples.axis
        own = self.samples.spread(self.own[self.results[ids]], h.shape[axis])
        behind = self.shape.along(own[0], h).shape
        own = own.view(h.shape[axis], *[1] * (h.dim() - axis - 1 - len(behind)), *behind)
        return self.shape.widen(h * own.to(h.dtype), self.b)


class RowwiseBottleneck(Rowwise, Serial):
    """`h + s_k (U_k sigma(D_k h + b_D) + b_U)`, maybe with a layer norm in front, for a sample with
    the adapter k; tables as in `Bottleneck`, with n + 1 entries."""

    axes: ClassVar[Axes] = {"ids": ("batch",)}

    def _keep(self, members: Sequence[Branch]) -> None:
        parts: list[Any] = [m.part() for m in members]
        rank, width = max(len(p.down) for p in parts), parts[0].down.shape[1]
        self.activation, self.normed = parts[0].activation, parts[0].before_weight is not None

        def vector(given: Tensor | None, size: int) -> Tensor:
            made = parts[0].down.new_zeros(size) if given is None else given
            return F.pad(made, (0, size - len(made)))

        def factor(part: Bottleneck) -> Tensor:
            given = part.down.new_tensor([part.scale]) if part.factor is None else part.factor
            return given.expand(width)

        tables = {
            "down": [F.pad(p.down, (0, 0, 0, rank - len(p.down))) for p in parts],
            "up": [F.pad(p.up, (0, rank - len(p.down))) for p in parts],
            "down_bias": [vector(p.down_bias, rank) for p in parts],
            "up_bias": [vector(p.up_bias, width) for p in parts],
            "factor": [factor(p) for p in parts],
        }
        if self.normed:
            tables["before_weight"] = [vector(p.before_weight, width) for p in parts]
            tables["before_bias"] = [vector(p.before_bias, width) for p in parts]
        for name, rows in tables.items():
            self.register_buffer(name, torch.stack([torch.zeros_like(rows[0]), *rows]), False)

    def forward(self, h: Tensor, skip: bool = True, **reads: Tensor) -> Tensor:
        """`h` with samples as `samples` says; reads `ids [batch]`, int64."""
        ids = reads["ids"]
        rows = self.samples.first(h, ids.shape[0])
        z = rows.flatten(1, -2) if rows.dim() > 2 else rows[:, None]
        own = {
            n: t[self.results[ids]].to(h.dtype) for n, t in self.named_buffers() if n != "results"
        }
        if self.normed:
            z = F.layer_norm(z, z.shape[-1:])
            z = z * own["before_weight"][:, None] + own["before_bias"][:, None]
        inner = ACTIVATIONS[self.activation](z @ own["down"].mT + own["down_bias"][:, None])
        update = (inner @ own["up"].mT + own["up_bias"][:, None]) * own["factor"][:, None]
        update = self.samples.back(update.view(rows.shape))
        return h + update if skip else update


def gathered(members: Sequence[Any], samples: Samples) -> Branch | None:
    """The branch of a slot that computes for each sample what its own member does, and no other;
    None where it takes all members to know."""
    there = [m for m in members if m is not None]
    parts = [m.part() for m in there]
    shape = there[0].shape
    if all(isinstance(p, Bottleneck) for p in parts):
        return RowwiseBottleneck(members, samples) if _alike(parts) else None
    plain = all(isinstance(p, LowRank) and p.magnitude is None and p.gate is None for p in parts)
    if not plain or any(not isinstance(m, Delta) for m in there):
        return None
    if isinstance(shape, EmbeddingShape):
        return RowwiseLookup(members, samples)
    if isinstance(shape, ConvolutionShape):
        return RowwiseConvolution(members, samples)
    return None


def _alike(parts: Sequence[Bottleneck]) -> bool:
    """Whether bottlenecks differ in their tensors alone, and are nothing where those are zero."""
    options = {(p.activation, p.before_weight is None, p.reads, p.skips) for p in parts}
    simple = all(p.after_weight is None and p.gate is None for p in parts)
    return simple and len(options) == 1 and next(iter(options))[2:] == ("output", "output")
