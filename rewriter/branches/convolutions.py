"""Convolutions as stacks of matrices: a row an output channel, a column an input channel and a
place of the kernel.

    convolution    y[o, p] = sum_{i, k} W[o, i, k] x[i, p s + k d - pad]
    transposed     y[o, q] = sum_{i, k} W[i, o, k] x[i, p]   over p s + k d - pad = q

Both are linear in the rows of `M[o, (i, k)]`, so that `M + b a` is a convolution of the same kind
by `a` with a channel a rank, and one of kernel 1 by `b`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Shape, normal


@dataclass(frozen=True)
class ConvolutionShape(Shape):
    """`x [..., in, *places]`; stored `[out, in / groups, *kernel]`.

    The options are those of the call; a padding may be a word.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    @property
    def count(self) -> int:
        return self.groups

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (-1, *self.kernel)).contiguous()

    @property
    def _operator(self) -> Any:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]

    def _call(self, x: Tensor, weight: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return self._operator(x, weight.to(x.dtype), None, *options)

    @property
    def _places(self) -> Iterator[int]:
        """Sizes of inputs that reach a few outputs."""
        steps = zip(self.kernel, self.stride, self.dilation, strict=True)
        return (d * (k - 1) + s + 1 for k, s, d in steps)

    def narrow(self, x: Tensor, a: Tensor, **operands: Tensor) -> Tensor:
        """`rank` channels a group."""
        return self._call(x, self.stored(a.flatten(0, -2)))

    def widen(self, h: Tensor, b: Tensor, **operands: Tensor) -> Tensor:
        """A convolution of kernel 1."""
        weight = b.reshape(-1, b.shape[-1], *(1 for _ in self.kernel))
        return self._operator(h, weight.to(h.dtype), groups=self.groups)

    def along(self, vector: Tensor, values: Tensor, **operands: Tensor) -> Tensor:
        return vector.view(-1, *(1 for _ in self.kernel))

    def drawn(
        self, matrix: Tensor, sizes: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        channels = matrix.shape[1] * self.groups
        for size in self.kernel:
            channels //= size
        x = normal((len(sizes), channels, *self._places), generator, sizes)
        return (x * sizes.view(-1, *(1 for _ in x.shape[1:]))).to(matrix), {}

    def applied(self, x: Tensor, matrix: Tensor, **operands: Tensor) -> Tensor:
        return self._call(x, self.stored(matrix))

    def samples(self, y: Tensor) -> Tensor:
        return y.flatten(1)

    def in_groups(self, groups: int) -> ConvolutionShape:
        return replace(self, groups=groups)


@dataclass(frozen=True)
class TransposedShape(ConvolutionShape):
    """`x [..., in, *places]`; stored `[in, out / groups, *kernel]`."""

    output_padding: tuple[int, ...] = ()

    @property
    def out_axis(self) -> int:
        return 1

    def matrix(self, stored: Tensor) -> Tensor:
        own = stored.unflatten(0, (self.groups, -1)).transpose(1, 2)  # [groups, out, in, *kernel]
        return own.flatten(2).flatten(0, 1)

    def stored(self, matrix: Tensor) -> Tensor:
        own = matrix.unflatten(0, (self.groups, -1)).unflatten(2, (-1, *self.kernel))
        return own.transpose(1, 2).flatten(0, 1).contiguous()

    def _call(self, x: Tensor, weight: Tensor) -> Tensor:
        operator = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        call: Any = operator[len(self.kernel) - 1]
        options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return call(x, weight.to(x.dtype), None, *options)

    @property
    def _places(self) -> Iterator[int]:
        steps = zip(self.padding, self.stride, strict=True)
        return (2 + math.ceil(2 * int(p) / s) for p, s in steps)
