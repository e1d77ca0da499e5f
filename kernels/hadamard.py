"""The Walsh-Hadamard transform as one operator: `peftfx::hadamard`.

    y = x H_n,   H_1 = [1],   H_2m = [[H_m, H_m], [H_m, -H_m]]

along the last axis, not normalised: `H_n H_n = n I`. It is its own adjoint, so backward is the
transform of the gradient, and nothing is saved for it. `H_ab = H_a (x) H_b`, so it is a product
with a small matrix along each of some axes: O(n log n) multiplications, at the speed of products.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, library

RADIX = 4
"""Bits of the axes: a product with 16 x 16 takes no longer than one with 8 x 8, on a CPU."""

_LIBRARY = library.Library("peftfx", "FRAGMENT")
_LIBRARY.define("hadamard(Tensor x) -> Tensor")


def hadamard_matrix(size: int) -> Tensor:
    """H `[size, size]`, float32; its entry (i, j) is -1 where i & j has an odd number of bits."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def reference(x: Tensor) -> Tensor:
    """The formula, with the whole matrix."""
    return x @ hadamard_matrix(x.shape[-1]).to(x)


def hadamard(x: Tensor) -> Tensor:
    """`x H`, differentiable.

    Args:
        x: `[..., n]`, n a power of two, any floating dtype, which is that of the result.

    Raises:
        ValueError: n is no power of two.
    """
    return torch.ops.peftfx.hadamard(x)


def digits(size: int) -> list[int]:
    """The sizes of the axes that an axis of this size is taken for, the last one first."""
    bits = size.bit_length() - 1
    return [1 << min(RADIX, bits - start) for start in range(0, bits, RADIX)]


@lru_cache(maxsize=64)
def _small(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard_matrix(size).to(device, dtype)


def transform(x: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """`scale x H`, for operators that compute with it: no gradient, and in float32 or float64.

    Args:
        x: as of `hadamard`.
        out: where to put it, contiguous and of the shape and dtype of x; it may not be x.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"the last axis has {size} entries, and must have a power of two")
    axes = digits(size)
    if not axes or not x.numel():
        return torch.mul(x, scale, out=out)
    y, done, into = x.contiguous(), 1, torch.empty(0)
    for place, digit in enumerate(axes):
        last = place == len(axes) - 1
        spare = torch.empty_like(y) if place < 2 else into
        into, y = y, spare if out is None or not last else out
        h, parts = _small(digit, x.dtype, x.device), into.view(-1, digit, done)
        alpha = scale if last else 1.0
        if done == 1:
            flat = y.view(-1, digit)
            torch.addmm(flat, parts[..., 0], h, beta=0, alpha=alpha, out=flat)
        else:
            stack = y.view(-1, digit, done)
            torch.baddbmm(
                stack, h.expand(len(parts), -1, -1), parts, beta=0, alpha=alpha, out=stack
            )
        done *= digit
    return y


def _forward(x: Tensor) -> Tensor:
    return transform(x if x.dtype == torch.float64 else x.float()).to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    del ctx, inputs, output


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    del ctx
    return torch.ops.peftfx.hadamard(dy)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("hadamard", _forward, _key)
library.register_fake(
    "peftfx::hadamard", lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)  # fmt: skip
library.register_autograd("peftfx::hadamard", _backward, setup_context=_setup, lib=_LIBRARY)

OPERATOR = torch.ops.peftfx.hadamard.default
"""The operator itself, for graphs."""
