"""What a weight is to the calls that multiply by it: a stack of matrices, whatever the operator.

    linear         y = W x                      one matrix
    embedding      y = W onehot(id)             one matrix [width, size]
    convolution    y = W patches(x)             one a group, [out / groups, in / groups * kernel]
    transposed     y = scattered W x            the same, see `convolutions.py`
    experts        y_t = W_e(t) x_t             one an expert, [out, in]

Branches see a weight as `[count * out, in]`, all matrices below one another. Their low-rank factors
are `a [rank, in]` and `b [out, rank]`, or `a [count, rank, in]` and `b [count, out, rank]` where
there are several matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of x; the parameters may be wider (see `Attaching.like`)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Shape(ABC):
    """How calls multiply by a weight, and how it is stored.

    `operands` are values that a call reads beside its input, by name (`ends` of grouped rows).
    """

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the other values of a call."""
        return ()

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return 1

    @property
    def out_axis(self) -> int:
        """The axis of the outputs in the stored tensor."""
        return 0

    @property
    def turned(self) -> bool:
        """Whether formats store a row an input, so that calls can gather what they read."""
        return False

    @abstractmethod
    def matrix(self, stored: Tensor) -> Tensor:
        """The stored tensor as `[count * out, in]`."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """Undoes `matrix`."""

    @abstractmethod
    def narrow(self, x: Tensor, a: Tensor, **operands: Tensor) -> Tensor:
        """The call with `a` in the place of the weight."""

    @abstractmethod
    def widen(self, h: Tensor, b: Tensor, **operands: Tensor) -> Tensor:
        """What `b` makes of the result of `narrow`."""

    def along(self, vector: Tensor, values: Tensor, **operands: Tensor) -> Tensor:
        """A vector `[features]`, or of experts `[count * features]`, as it multiplies inputs or
        outputs of the call."""
        del values, operands
        return vector

    def low_rank(
        self, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, **operands: Tensor
    ) -> Tensor:
        """The call with `scale b a` in the place of the weight, which is never formed.

        Args:
            scale: a number, or one for each rank, `[rank]`.
        """
        h = self.narrow(x, a, **operands)
        factor = self.along(scale.to(h.dtype), h) if isinstance(scale, Tensor) else scale
        return self.widen(h * factor, b, **operands)  # scales rank columns, not out

    def product(self, b: Tensor, a: Tensor) -> Tensor:
        """`b a` as `[count * out, in]`."""
        return b @ a if b.dim() == 2 else (b @ a).flatten(0, 1)

    def columns(self, scale: Tensor, matrix: Tensor) -> Tensor:
        """A scale of the call's input as it multiplies the matrix.

        Args:
            scale: `[in]`, of a convolution its channels, of experts `[count * in]`.
            matrix: `[count * out, in]`.
        """
        each = scale.view(self.count, 1, -1, 1)
        kernel = matrix.shape[1] // each.shape[2]
        wide = each.expand(-1, matrix.shape[0] // self.count, -1, kernel)
        return wide.reshape(matrix.shape)

    @abstractmethod
    def drawn(
        self, matrix: Tensor, sizes: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Random inputs of a call, and its operands.

        Args:
            matrix: `[count * out, in]`, for widths, dtype and device.
            sizes: magnitudes `[n]`, one a sample.
        """

    @abstractmethod
    def applied(self, x: Tensor, matrix: Tensor, **operands: Tensor) -> Tensor:
        """The call with another matrix `[count * out, in]`, without bias."""

    def samples(self, y: Tensor) -> Tensor:
        """Values of the call as `[samples, numbers]`."""
        return y

    def in_groups(self, groups: int) -> Shape:
        """The same call with its channels in other groups: 1 mixes all, one a channel none.

        Raises:
            TypeError: it is no convolution.
        """
        raise TypeError(f"{type(self).__name__} has no groups (asked for {groups})")

    def widened(self, dtype: torch.dtype) -> Shape:
        """The same for a branch that computes in another dtype."""
        del dtype
        return self


def normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


@dataclass(frozen=True)
class LinearShape(Shape):
    """`x [..., in]`; stored `[out, in]`, or `[in, out]` with `in_out`."""

    in_out: bool = False

    @property
    def out_axis(self) -> int:
        return int(self.in_out)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if self.in_out else stored

    def stored(self, matrix: Tensor) -> Tensor:
        return self.matrix(matrix).contiguous()

    def narrow(self, x: Tensor, a: Tensor, **operands: Tensor) -> Tensor:
        return linear(x, a)

    def widen(self, h: Tensor, b: Tensor, **operands: Tensor) -> Tensor:
        return linear(h, b)

    def drawn(
        self, matrix: Tensor, sizes: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = normal((len(sizes), matrix.shape[1]), generator, sizes)
        return (x * sizes[:, None]).to(matrix), {}

    def applied(self, x: Tensor, matrix: Tensor, **operands: Tensor) -> Tensor:
        return x @ matrix.mT


@dataclass(frozen=True)
class EmbeddingShape(Shape):
    """Rows of a table `[size, width]` by ids.

    Attributes:
        dtype: of the rows.
        padding: the id whose row gets no gradient, None for none.
        wraps: ids may be negative and count from the end.
    """

    dtype: torch.dtype
    padding: int | None = None
    wraps: bool = False

    @property
    def turned(self) -> bool:
        return True

    @property
    def out_axis(self) -> int:
        return 1

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT.contiguous()

    def narrow(self, x: Tensor, a: Tensor, **operands: Tensor) -> Tensor:
        rows = a.mT[x] if self.wraps else F.embedding(x, a.mT, self.padding)
        return rows.to(self.dtype)

    def widen(self, h: Tensor, b: Tensor, **operands: Tensor) -> Tensor:
        return linear(h, b).to(self.dtype)  # under autocast, too

    def drawn(
        self, matrix: Tensor, sizes: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        ids = torch.randperm(matrix.shape[1], generator=generator)[:4096]
        return ids.to(matrix.device), {}

    def applied(self, x: Tensor, matrix: Tensor, **operands: Tensor) -> Tensor:
        return matrix.mT[x]

    def widened(self, dtype: torch.dtype) -> Shape:
        return EmbeddingShape(dtype, self.padding, self.wraps)


@dataclass(frozen=True)
class ExpertsShape(Shape):
    """A matrix an expert, stored `[experts, out, in]`, or `[experts, in, out]` with `in_out`; the
    experts may have another `place` among the axes.

    Of rows by expert, `x [..., experts, rows, in]` (of `W x` turned by the branch's `axis`); or,
    `grouped`, of sorted rows `x [rows, in]`, of which those of expert e stop before `ends[e]`. Rows
    behind the last end are of no expert, and what a branch adds to them is zero.

    Attributes:
        operator: the call's own, where that is torch's, by which branches multiply on a GPU in
            bfloat16. Elsewhere `peftfx::grouped_product` is as fast and takes every dtype.
    """

    experts: int
    in_out: bool
    grouped: bool
    operator: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    place: int = 0

    @property
    def operands(self) -> tuple[str, ...]:
        return ("ends",) if self.grouped else ()

    @property
    def count(self) -> int:
        return self.experts

    @property
    def out_axis(self) -> int:
        return [k for k in range(3) if k != self.place][self.in_out]

    def matrix(self, stored: Tensor) -> Tensor:
        stack = stored.movedim(self.place, 0)
        return (stack.mT if self.in_out else stack).flatten(0, 1)

    def stored(self, matrix: Tensor) -> Tensor:
        stack = matrix.unflatten(0, (self.experts, -1))
        return (stack.mT if self.in_out else stack).movedim(0, self.place).contiguous()

    def narrow(self, x: Tensor, a: Tensor, **operands: Tensor) -> Tensor:
        return self._product(x, a, **operands)

    def widen(self, h: Tensor, b: Tensor, **operands: Tensor) -> Tensor:
        return self._product(h, b, **operands)

    def _product(self, x: Tensor, matrices: Tensor, **operands: Tensor) -> Tensor:
        """Each row times the matrix `[out, in]` of its expert."""
        matrices = matrices.to(x.dtype)
        if not self.grouped:
            return x @ matrices.mT
        ends = operands["ends"]
        if self.operator is None or not x.is_cuda or x.dtype != torch.bfloat16:
            return torch.ops.peftfx.grouped_product(x, matrices.mT, ends)
        out, size = matrices.shape[1:]
        step = 16 // x.dtype.itemsize  # it asks for rows of 16 bytes, and leaves others undefined
        own = torch.arange(x.shape[0], device=x.device)[:, None] < ends[-1]
        x = F.pad(torch.where(own, x, 0.0), (0, -size % step))
        matrices = F.pad(matrices, (0, -size % step, 0, -out % step))
        return torch.where(own, self.operator(x, matrices.mT, ends)[:, :out], 0.0)

    def along(self, vector: Tensor, values: Tensor, **operands: Tensor) -> Tensor:
        if not self.grouped:
            return vector.view(self.experts, 1, -1)
        row = torch.arange(values.shape[0], device=vector.device)[:, None]
        mine = (row >= operands["ends"]).sum(-1).clamp(max=self.experts - 1)
        return vector.view(self.experts, -1)[mine]

    def drawn(
        self, matrix: Tensor, sizes: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = normal((self.experts, len(sizes), matrix.shape[1]), generator, sizes)
        x = (x * sizes[:, None]).to(matrix)
        if not self.grouped:
            return x, {}
        ends = torch.arange(1, self.experts + 1, device=matrix.device) * len(sizes)
        return x.flatten(0, 1), {"ends": ends.to(torch.int32)}

    def applied(self, x: Tensor, matrix: Tensor, **operands: Tensor) -> Tensor:
        stack = matrix.unflatten(0, (self.experts, -1)).mT
        if not self.grouped:
            return x @ stack
        ends: list[int] = operands["ends"].tolist()
        pieces = x[: ends[-1]].tensor_split(ends[:-1])
        return torch.cat([p @ w for p, w in zip(pieces, stack, strict=True)])

    def samples(self, y: Tensor) -> Tensor:
        return y.flatten(0, -2)

    def widened(self, dtype: torch.dtype) -> Shape:
        return replace(self, operator=None)  # none multiplies in float64
