"""One operator for a linear over codes into a table: `peftfx::codebook_linear`.

    y = x W^T + bias,   W[i, j] = scale[i, G] table[code[i, j]],   G = j // group

x [..., K]; codes uint8 [N, groups, bytes], bits 2, 4 or 8 each, along K, the first in the lowest
bits (the last group may be padded); scale [N, groups]; table [2 ** bits], the values that codes
stand for. See `stored_linear.py` for what is kept and when;

    dscale[i, G] = sum_{j in G} dW[i, j] table[code[i, j]]
    dtable[c] = sum_{code[i, j] = c} dW[i, j] scale[i, G]

NF4 is one such table: Dettmers et al., NeurIPS 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .stored_linear import StoredLinear, digits, unpack


def codebook_dense(
    codes: Tensor, scale: Tensor, table: Tensor, bits: int, group: int, size: int
) -> Tensor:
    """The dense weight, `[N, size]`, in the dtype of `scale`; differentiable in scale and table."""
    values = table.to(scale.dtype)[digits(codes, bits)[..., :group].long()]
    return (values * scale.unsqueeze(-1)).flatten(1)[:, :size]


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """The formula, with a dense weight and plain autograd."""
    weight = codebook_dense(codes, scale, table, bits, group, x.shape[-1]).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def codebook_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`x W^T + bias`, differentiable in x, scale, table and bias.

    Args:
        x: `[..., K]`, any floating dtype, which is that of the result.
        codes: uint8 `[N, groups, bytes]`; scale: `[N, groups]`; table: `[2 ** bits]`.
        bias: `[N]` or None.
        bits: 2, 4 or 8; group: codes a group (the last group may be shorter than that).

    Returns:
        `[..., N]`.
    """
    return torch.ops.peftfx.codebook_linear(x, codes, scale, table, bias, bits, group)


def _values(
    parts: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The codes, int32, and what they stand for, `[rows, groups, group]`."""
    codes, _, table = parts
    index = unpack(codes, *numbers).int()
    return index, table.to(dtype).index_select(0, index.flatten()).view(index.shape)


def _rows(parts: Sequence[Tensor], numbers: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    _, values = _values(parts, numbers, dtype)
    return values.mul_(parts[1].to(dtype).unsqueeze(-1)).flatten(1)[:, :size]


def _pull(
    dw: Tensor, parts: Sequence[Tensor], numbers: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    codes, scale, table = parts
    index, values = _values(parts, numbers, dw.dtype)
    dw = F.pad(dw, (0, index[0].numel() - dw.shape[1])).view(index.shape)
    by_code = torch.zeros_like(table, dtype=dw.dtype)
    if needs[2]:
        scaled = dw * scale.to(dw.dtype).unsqueeze(-1)
        by_code.index_add_(0, index.flatten(), scaled.flatten())
    return [codes, (dw * values).sum(-1) if needs[1] else scale, by_code]


OPERATOR = StoredLinear(
    "codebook_linear", ("codes", "scale", "table"), ("bits", "group"),
    codebook_dense, "codebook_dense", _rows, _pull, shared=("table",),
).register()  # fmt: skip
"""The operator itself, for graphs."""
