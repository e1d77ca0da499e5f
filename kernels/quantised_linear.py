"""One operator for a linear whose weight is stored as integers: `peftfx::quantised_linear`.

    y = x W^T + bias,   W[i, j] = scale[i, G] (code[i, j] - zero[i, G]),   G = j // group

x [..., K]; codes uint8 [N, groups, bytes], bits 2, 4 or 8 each, along K, the first in the lowest
bits (the layout of ONNX Runtime's MatMulNBits; the last group may be padded); scale [N, groups];
zero [N, groups] in floating point, or uint8 integers packed like the codes.

Rows of W are made a slice at a time, in forward and again in backward, so no dense weight exists
as a whole and none is kept. Backward keeps x only if scale or zero train:

    dx = dy W,   dW = dy^T x (one slice of rows at a time),   dbias = sum dy
    dscale[i, G] = sum_{j in G} dW[i, j] (code[i, j] - zero[i, G])
    dzero[i, G] = -scale[i, G] sum_{j in G} dW[i, j]

Training the scales: Kim et al., NeurIPS 2023, arXiv:2305.14152.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

SLICE = 1 << 20
"""Elements of the dense weight that exist at a time."""


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 `[..., bytes]` -> uint8 `[..., count]`, the first value in the lowest bits."""
    if bits == 8:
        return packed[..., :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count]


def _offsets(codes: Tensor, zero: Tensor, bits: int, group: int, wide: torch.dtype) -> Tensor:
    """`code - zero`, `[rows, groups, group]`."""
    if zero.dtype == torch.uint8:
        zero = unpack(zero, bits, codes.shape[1])
    return unpack(codes, bits, group).to(wide).sub_(zero.to(wide).unsqueeze(-1))


def dequantise(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, size: int
) -> Tensor:
    """The dense weight, `[N, size]`, in the dtype of `scale`; differentiable in scale and zero.

    Also `peftfx::dequantise`, for branches that read the weight itself. In plain arithmetic: no
    exporter has shifts of bytes.
    """
    offsets = _digits(codes, bits)[..., :group].to(scale.dtype)
    if zero.dtype == torch.uint8:
        zero = _digits(zero, bits)[..., : codes.shape[1]]
    offsets = offsets - zero.to(scale.dtype).unsqueeze(-1)
    return (offsets * scale.unsqueeze(-1)).flatten(1)[:, :size]


def _digits(packed: Tensor, bits: int) -> Tensor:
    """`unpack` in floating point."""
    powers = 2.0 ** torch.arange(0, 8, bits, device=packed.device)
    return (torch.floor(packed.unsqueeze(-1) / powers) % (1 << bits)).flatten(-2)


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


def _slices(codes: Tensor, size: int) -> Iterator[slice]:
    rows = max(1, SLICE // max(1, size))
    for start in range(0, codes.shape[0], rows):
        yield slice(start, start + rows)


def _forward(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    wide = torch.promote_types(scale.dtype, x.dtype)
    y = x.new_empty((rows.shape[0], codes.shape[0]))
    for part in _slices(codes, size):
        offsets = _offsets(codes[part], zero[part], bits, group, wide)
        weight = offsets.mul_(scale[part].to(wide).unsqueeze(-1)).flatten(1)[:, :size]
        y[:, part] = rows @ weight.to(x.dtype).t()
    if bias is not None:
        y += bias.to(y.dtype)
    return y.view(*x.shape[:-1], codes.shape[0])


def _gradients(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group: int,
    size: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    need_x, need_scale, need_zero, need_bias = needs
    down = dy.reshape(-1, dy.shape[-1])
    wide = torch.promote_types(scale.dtype, dy.dtype)
    dx = dy.new_zeros((down.shape[0], size) if need_x else 0)
    dscale = torch.zeros_like(scale) if need_scale else scale.new_empty(0)
    dzero = torch.zeros_like(zero) if need_zero else zero.new_empty(0)
    rows = x.reshape(-1, size) if need_scale or need_zero else x
    padded = codes.shape[1] * group
    for part in _slices(codes, size):
        offsets = _offsets(codes[part], zero[part], bits, group, wide)
        factor = scale[part].to(wide).unsqueeze(-1)
        if need_scale or need_zero:
            dw = (down[:, part].t() @ rows).to(wide)
            dw = F.pad(dw, (0, padded - size)).view(offsets.shape)
            if need_scale:
                dscale[part] = (dw * offsets).sum(-1)
            if need_zero:
                dzero[part] = -(dw * factor).sum(-1)
        if need_x:
            weight = offsets.mul_(factor).flatten(1)[:, :size]
            dx.addmm_(down[:, part], weight.to(dy.dtype))
    return [
        dx.view(*dy.shape[:-1], size) if need_x else dx,
        dscale,
        dzero,
        down.sum(0) if need_bias else dy.new_empty(0),
    ]


def _forward_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _gradients_fake(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group: int,
    size: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [
        dy.new_empty((*dy.shape[:-1], size) if needs[0] else (0,)),
        scale.new_empty(scale.shape if needs[1] else (0,)),
        zero.new_empty(zero.shape if needs[2] else (0,)),
        dy.new_empty((dy.shape[-1],) if needs[3] else (0,)),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, codes, scale, zero, bias, bits, group = inputs
    trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if trained else codes, codes, scale, zero)
    ctx.bits, ctx.group, ctx.size = bits, group, x.shape[-1]
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, codes, scale, zero = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[2], wanted[3], wanted[4] and ctx.bias is not None]
    dx, dscale, dzero, dbias = torch.ops.peftfx.quantised_linear_backward(
        dy, x, codes, scale, zero, ctx.bits, ctx.group, ctx.size, needs
    )
    return (
        dx if needs[0] else None,
        None,
        dscale if needs[1] else None,
        dzero if needs[2] else None,
        dbias.to(ctx.bias) if needs[3] else None,
        None,
        None,
    )


def _autocast(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    device = x.device.type
    with torch.autocast(device, enabled=False):
        x = x.to(torch.get_autocast_dtype(device))
        return torch.ops.peftfx.quantised_linear(x, codes, scale, zero, bias, bits, group)


_LIBRARY = library.Library("peftfx", "FRAGMENT")
_LIBRARY.define(
    "quantised_linear(Tensor x, Tensor codes, Tensor scale, Tensor zero, Tensor? bias, int bits, "
    "int group) -> Tensor"
)
_LIBRARY.define(
    "quantised_linear_backward(Tensor dy, Tensor x, Tensor codes, Tensor scale, Tensor zero, "
    "int bits, int group, SymInt size, bool[] needs) -> Tensor[]"
)
_LIBRARY.define(
    "dequantise(Tensor codes, Tensor scale, Tensor zero, int bits, int group, int size) -> Tensor"
)
_LIBRARY.impl("dequantise", dequantise, "CompositeImplicitAutograd")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("quantised_linear", _forward, _key)
    _LIBRARY.impl("quantised_linear_backward", _gradients, _key)
    _LIBRARY.impl("quantised_linear", _autocast, f"Autocast{_key}")
library.register_fake("peftfx::quantised_linear", _forward_fake, lib=_LIBRARY)
library.register_fake("peftfx::quantised_linear_backward", _gradients_fake, lib=_LIBRARY)
library.register_autograd("peftfx::quantised_linear", _backward, setup_context=_setup, lib=_LIBRARY)

OPERATOR = torch.ops.peftfx.quantised_linear.default
"""The operator itself, for graphs."""
