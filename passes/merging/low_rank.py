"""The nearest low-rank matrices, by singular values (Eckart & Young, Psychometrika 1936).

All work on stacks `[..., out, in]`, in float64 (float32 where a device has no other).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """`b a`, of equal norms, with what is missing.

    Attributes:
        a: `[..., rank, in]`.
        b: `[..., out, rank]`.
        error: norm of what is missing, as a share of the whole's.
    """

    a: Tensor
    b: Tensor
    error: float


def nearest(matrix: Tensor, rank: int | None = None, energy: float | None = None) -> Factors:
    """The nearest product of a rank.

    Args:
        matrix: `[..., out, in]`.
        rank: at most; by default, as many as there are.
        energy: as few ranks as hold this share of the sum of squares, in (0, 1].
    """
    u, s, v = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return _cut(u, s, v, rank, energy)


def nearest_to_product(
    b: Tensor, a: Tensor, rank: int | None = None, energy: float | None = None
) -> Factors:
    """The same of `b a`, whose matrix is never formed."""
    left, core_b = torch.linalg.qr(_wide(b))
    right, core_a = torch.linalg.qr(_wide(a).mT)
    u, s, v = torch.linalg.svd(core_b @ core_a.mT, full_matrices=False)
    return _cut(left @ u, s, v @ right.mT, rank, energy)


def apart(want: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor]) -> float:
    """How far two products `b a` are apart, as a share of the first, on random inputs."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(want[1].shape[-1], 4, generator=drawn, dtype=torch.float64)
    values = [_wide(b) @ (_wide(a) @ _wide(x.to(a.device))) for b, a in (want, got)]
    return share(values[1] - values[0], values[0])


def share(part: Tensor, whole: Tensor) -> float:
    """The norm of a part as a share of that of the whole; 0 of nothing."""
    size = float(torch.linalg.vector_norm(whole.double()))
    return float(torch.linalg.vector_norm(part.double())) / size if size else 0.0


def _cut(u: Tensor, s: Tensor, v: Tensor, rank: int | None, energy: float | None) -> Factors:
    squares = s.square()
    count = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    if energy is not None:
        held = squares.cumsum(-1) >= energy * squares.sum(-1, keepdim=True) * (1 - 1e-12)
        first = (~held).sum(-1).amax() + 1  # of a stack, what the most needy matrix asks for
        count = min(count, int(first))
    total, missing = float(squares.sum()), float(squares[..., count:].sum())
    roots = s[..., :count].sqrt()
    a, b = roots[..., :, None] * v[..., :count, :], u[..., :count] * roots[..., None, :]
    return Factors(a, b, (missing / total) ** 0.5 if total else 0.0)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)
