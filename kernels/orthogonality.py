"""How far rows are from being orthonormal: `R R^T - I`.

As a loss term (its Frobenius norm) it keeps the factors of a decomposition like singular vectors
(Zhang et al., ICLR 2023, arXiv:2303.10512, eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality_gap(rows: Tensor) -> Tensor:
    """`R R^T - I`, computed in at least float32.

    Args:
        rows: R `[n, width]`, any floating dtype.

    Returns:
        `[n, n]`, zero if the rows are orthonormal.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide @ wide.mT - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
