"""One operator for a linear whose weight has 2 of every 4 entries: `peftfx::sparse24_linear`.

    y = x W^T + bias,   W[i, 4 G + position[i, G, k]] = values[i, G, k],   k = 0, 1, else 0

x [..., K]; values [N, ceil(K / 4), 2]; positions uint8 [N, bytes], 2 bits each, the two of a group
one after the other and distinct, the first in the lowest bits. See `stored_linear.py` for what is
kept and when;

    dvalues[i, G, k] = dW[i, 4 G + position[i, G, k]]

The pattern: Mishra et al. 2021, arXiv:2104.08378.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .stored_linear import StoredLinear, digits, unpack

_GROUP = 4


def sparse24_dense(values: Tensor, positions: Tensor, group: int, size: int) -> Tensor:
    """The dense weight, `[N, size]`, in the dtype of `values`, in which it is differentiable."""
    places = digits(positions, 2)[:, : 2 * values.shape[1]].unflatten(1, (-1, 2, 1))
    chosen = places == torch.arange(group, dtype=places.dtype, device=places.device)
    return (chosen.to(values.dtype) * values.unsqueeze(-1)).sum(-2).flatten(1)[:, :size]


def reference(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    """The formula, with a dense weight and plain autograd."""
    weight = sparse24_dense(values, positions, group, x.shape[-1]).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def sparse24_linear(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, group: int = _GROUP
) -> Tensor:
    """`x W^T + bias`, differentiable in x, values and bias.

    Args:
        x: `[..., K]`, any floating dtype, which is that of the result.
        values: `[N, groups, 2]`; positions: uint8 `[N, bytes]`.
        bias: `[N]` or None.
        group: 4, the entries that two are kept of (the last group may be shorter than that).

    Returns:
        `[..., N]`.
    """
    return torch.ops.peftfx.sparse24_linear(x, values, positions, bias, group)


def _places(values: Tensor, positions: Tensor) -> Tensor:
    return unpack(positions, 2, 2 * values.shape[1]).long().view(values.shape)


def _rows(parts: Sequence[Tensor], numbers: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    values, positions = parts
    dense = values.new_zeros((*values.shape[:2], numbers[0]), dtype=dtype)
    dense.scatter_(-1, _places(values, positions), values.to(dtype))
    return dense.flatten(1)[:, :size]


def _pull(
    dw: Tensor, parts: Sequence[Tensor], numbers: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    del needs  # it is called where the values train
    values, positions = parts
    dw = F.pad(dw, (0, values.shape[1] * numbers[0] - dw.shape[1])).unflatten(1, (-1, numbers[0]))
    return [dw.gather(-1, _places(values, positions)), positions]


OPERATOR = StoredLinear(
    "sparse24_linear", ("values", "positions"), ("group",),
    sparse24_dense, "sparse24_dense", _rows, _pull,
).register()  # fmt: skip
"""The operator itself, for graphs."""
