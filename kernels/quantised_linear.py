"""One operator for a linear whose weight is stored as integers: `peftfx::quantised_linear`.

    y = x W^T + bias,   W[i, j] = scale[i, G] (code[i, j] - zero[i, G]),   G = j // group

x [..., K]; codes uint8 [N, groups, bytes], bits 2, 4 or 8 each, along K, the first in the lowest
bits (the layout of ONNX Runtime's MatMulNBits; the last group may be padded); scale [N, groups];
zero [N, groups] in floating point, or uint8 integers packed like the codes. See `stored_linear.py`
for what is kept and when;

    dscale[i, G] = sum_{j in G} dW[i, j] (code[i, j] - zero[i, G])
    dzero[i, G] = -scale[i, G] sum_{j in G} dW[i, j]

Training the scales: Kim et al., NeurIPS 2023, arXiv:2305.14152.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .stored_linear import StoredLinear, digits, unpack


def dequantise(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, size: int
) -> Tensor:
    """The dense weight, `[N, size]`, in the dtype of `scale`; differentiable in scale and zero.

    Also `peftfx::dequantise`, for branches that read the weight itself. In plain arithmetic: no
    exporter has shifts of bytes.
    """
    offsets = digits(codes, bits)[..., :group].to(scale.dtype)
    if zero.dtype == torch.uint8:
        zero = digits(zero, bits)[..., : codes.shape[1]]
    offsets = offsets - zero.to(scale.dtype).unsqueeze(-1)
    return (offsets * scale.unsqueeze(-1)).flatten(1)[:, :size]


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """The formula, with a dense weight and plain autograd."""
    weight = dequantise(codes, scale, zero, bits, group, x.shape[-1]).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def quantised_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`x W^T + bias`, differentiable in x, scale, zero (if it is floating) and bias.

    Args:
        x: `[..., K]`, any floating dtype, which is that of the result.
        codes: uint8 `[N, groups, bytes]`; scale: `[N, groups]`, at least float32 to train it.
        zero: `[N, groups]` floating, or uint8 packed along the groups.
        bias: `[N]` or None.
        bits: 2, 4 or 8; group: codes a group (the last group may be shorter than that).

    Returns:
        `[..., N]`.
    """
    return torch.ops.peftfx.quantised_linear(x, codes, scale, zero, bias, bits, group)


def _offsets(parts: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`code - zero`, `[rows, groups, group]`."""
    codes, _, zero = parts
    bits, group = numbers
    if zero.dtype == torch.uint8:
        zero = unpack(zero, bits, codes.shape[1])
    return unpack(codes, bits, group).to(dtype).sub_(zero.to(dtype).unsqueeze(-1))


def _rows(parts: Sequence[Tensor], numbers: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    offsets = _offsets(parts, numbers, dtype)
    return offsets.mul_(parts[1].to(dtype).unsqueeze(-1)).flatten(1)[:, :size]


def _pull(
    dw: Tensor, parts: Sequence[Tensor], numbers: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    codes, scale, zero = parts
    offsets = _offsets(parts, numbers, dw.dtype)
    dw = F.pad(dw, (0, offsets[0].numel() - dw.shape[1])).view(offsets.shape)
    return [
        codes,
        (dw * offsets).sum(-1) if needs[1] else scale,
        -(dw * scale.to(dw.dtype).unsqueeze(-1)).sum(-1) if needs[2] else zero,
    ]


OPERATOR = StoredLinear(
    "quantised_linear", ("codes", "scale", "zero"), ("bits", "group"),
    dequantise, "dequantise", _rows, _pull,
).register()  # fmt: skip
"""The operator itself, for graphs."""
