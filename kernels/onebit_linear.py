"""One operator for a linear whose weight is stored as signs: `peftfx::onebit_linear`.

    y = x W^T + bias,   W[i, j] = scale[i, G] (2 sign[i, j] - 1),   G = j // group

x [..., K]; signs uint8 [N, groups, bytes], one bit each, along K, the first in the lowest bit (the
last group may be padded); scale [N, groups]. See `stored_linear.py` for what is kept and when;

    dscale[i, G] = sum_{j in G} dW[i, j] (2 sign[i, j] - 1)

Signs and one scale: Liu et al., NeurIPS 2024, arXiv:2402.10193 (of the change of a weight).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .stored_linear import StoredLinear, digits, unpack


def onebit_dense(signs: Tensor, scale: Tensor, group: int, size: int) -> Tensor:
    """The dense weight, `[N, size]`, in the dtype of `scale`; differentiable in scale."""
    values = digits(signs, 1)[..., :group].to(scale.dtype) * 2 - 1
    return (values * scale.unsqueeze(-1)).flatten(1)[:, :size]


def reference(x: Tensor, signs: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """The formula, with a dense weight and plain autograd."""
    weight = onebit_dense(signs, scale, group, x.shape[-1]).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def onebit_linear(
    x: Tensor, signs: Tensor, scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    """`x W^T + bias`, differentiable in x, scale and bias.

    Args:
        x: `[..., K]`, any floating dtype, which is that of the result.
        signs: uint8 `[N, groups, bytes]`; scale: `[N, groups]`.
        bias: `[N]` or None.
        group: signs a group (the last group may be shorter than that).

    Returns:
        `[..., N]`.
    """
    return torch.ops.peftfx.onebit_linear(x, signs, scale, bias, group)


def _values(parts: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """1 and -1, `[rows, groups, group]`."""
    return unpack(parts[0], 1, numbers[0]).to(dtype).mul_(2).sub_(1)


def _rows(parts: Sequence[Tensor], numbers: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    scale = parts[1].to(dtype).unsqueeze(-1)
    return _values(parts, numbers, dtype).mul_(scale).flatten(1)[:, :size]


def _pull(
    dw: Tensor, parts: Sequence[Tensor], numbers: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    del needs  # it is called where the scale trains
    values = _values(parts, numbers, dw.dtype)
    dw = F.pad(dw, (0, values[0].numel() - dw.shape[1])).view(values.shape)
    return [parts[0], (dw * values).sum(-1)]


OPERATOR = StoredLinear(
    "onebit_linear", ("signs", "scale"), ("group",), onebit_dense, "onebit_dense", _rows, _pull
).register()
"""The operator itself, for graphs."""
