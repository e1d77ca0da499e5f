"""Rotations of features by blocks: orthogonal matrices made of skew ones, and butterflies of them.

A rotation is `R [blocks, size, size]`, which maps `[..., blocks * size]`. Cayley's map of a skew Q
is `(1 - Q)(1 + Q)^-1 = 2 (1 + Q)^-1 - 1`, orthogonal to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def side(count: int) -> int:
    """The size of a skew matrix of so many numbers above the diagonal.

    Raises:
        ValueError: there is none.
    """
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) // 2 != count:
        raise ValueError(f"no skew matrix has {count} numbers above its diagonal")
    return size


def places(size: int) -> Tensor:
    """Which of `[v, -v, 0]` every entry of a skew matrix is, int64 `[size * size]`."""
    rows, columns = torch.triu_indices(size, size, 1)
    count = len(rows)
    index = torch.full((size, size), 2 * count)
    index[rows, columns] = torch.arange(count)
    index[columns, rows] = torch.arange(count, 2 * count)
    return index.flatten()


def skew(vectors: Tensor, index: Tensor) -> Tensor:
    """`[blocks, size, size]` of the numbers above the diagonals, row by row, `[blocks, n]`."""
    own = torch.cat([vectors, -vectors, vectors.new_zeros(vectors.shape[0], 1)], 1)
    size = math.isqrt(index.shape[0])
    return own.index_select(1, index).unflatten(1, (size, size))


def within(q: Tensor, eps: float) -> Tensor:
    """Vectors of skew matrices, `[blocks, n]`, of which those of a norm above `eps / sqrt(blocks)`
    are scaled to that."""
    most = eps / (2 * len(q)) ** 0.5  # a skew matrix has every number twice
    return q * (most / q.norm(dim=1, keepdim=True).clamp(min=most))


def cayley(q: Tensor) -> Tensor:
    """The rotations of skew matrices, in their dtype."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return 2 * torch.linalg.inv_ex(one + q).inverse - one  # never singular, so nothing is checked


def series(q: Tensor, terms: int) -> Tensor:
    """The first terms of the series of the rotation's inverse, as PEFT counts them: `1 + 2 Q` of
    two, `1 + 2 Q + 2 Q^2 + Q^3` of three and of four, `... + 2 Q^3 + Q^4` of five. Near a rotation
    only where Q is small."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms == 2:
        return one + 2 * q
    inner = 2 * one + q
    for _ in range(max(terms, 4) - 3):
        inner = torch.baddbmm(2 * one, q, inner)
    return torch.baddbmm(one, q, inner)


def turned(x: Tensor, r: Tensor) -> Tensor:
    """`x R` by blocks, in the dtype of x; one block is of all features alike."""
    r = r.to(x.dtype)
    if x.dim() == 2:  # strides of merged rows do not part for all sizes alike
        x = x.clone(memory_format=torch.contiguous_format)
    blocks = x.unflatten(-1, (-1, r.shape[-1]))
    if len(r) == 1:
        return (blocks @ r[0]).flatten(-2)
    return torch.einsum("...nk,nkc->...nc", blocks, r).flatten(-2)


def butterfly(x: Tensor, r: Tensor, back: bool = False) -> Tensor:
    """`x R` by the factors of a butterfly, `[factors, blocks, size, size]`, the last one first;
    `back`: by the transposed ones, from the first.

    Factor i mixes features that lie `2^i size / 2` apart (Liu et al., ICLR 2024).
    """
    size, count = r.shape[-1], len(r)
    for index in range(count) if back else range(count - 1, -1, -1):
        own = r[index].mT if back else r[index]
        apart = (-1, 2, 2**index, size // 2)
        if index:
            x = x.unflatten(-1, apart).transpose(-3, -2).flatten(-4)
        x = turned(x, own)
        if index:
            together = (-1, 2**index, 2, size // 2)
            x = x.unflatten(-1, together).transpose(-3, -2).flatten(-4)
    return x
