"""One operator for a frozen linear and its low-rank branch: `peftfx::lora_linear`.

    y = x W^T + bias + s (x A^T) B^T        x [..., K], W [N, K], A [R, K], B [N, R]

Forward: S = x A^T, then the low-rank product is accumulated into the linear's own output, so no
second [M, N] tensor exists. Backward saves only x (S = x A^T is recomputed, R is small) and never
forms a gradient of shape [N, K] for the frozen weight:

    dS = s dy B,   dx = dy W + dS A,   dA = dS^T x,   dB = s dy^T S,   dbias = sum dy

The products of rank R are computed transposed, [R, M]: with the short axis first, a CPU's matrix
product is 2 to 5 times faster. On CUDA tensors with triton installed the kernels of
`gpu/lora_linear.py` run instead. LoRA: Hu et al. 2021, arXiv:2106.09685. Split after the rank-R
product: LoRAFusion, arXiv:2510.00206.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The formula, term by term, in the tensors' own dtype."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """`x W^T + bias + scale (x A^T) B^T`, differentiable in every tensor.

    Args:
        x: `[..., K]`, any floating dtype; weight: `[N, K]`; bias: `[N]` or None.
        a: `[R, K]`; b: `[N, R]`, also wider than x, whose dtype is computed in (autocast is
            respected).
        scale: of the low-rank product.

    Returns:
        `[..., N]`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    a, b = a.to(x.dtype), b.to(x.dtype)
    return torch.ops.peftfx.lora_linear(x, weight, bias, a, b, scale)


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def require_triton() -> None:
    """Raises RuntimeError, saying what is missing, unless Triton kernels can run here."""
    if not has_triton():
        raise RuntimeError("Triton kernels need the package triton: pip install 'peftfx[kernels]'.")
    if not torch.cuda.is_available():
        raise RuntimeError("Triton kernels need a CUDA device; none is visible. Use target=cpu.")


def _gpu() -> Any:
    return importlib.import_module(f"{__package__}.gpu.lora_linear")


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and has_triton():
        y = _gpu().forward(rows, weight, bias, a, b, scale)
    else:
        y = F.linear(rows, weight, bias)
        y.addmm_((a @ rows.t()).t(), b.t(), alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0])


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, needs: Sequence[bool]
) -> list[Tensor]:
    rows, down = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    none = dy.new_empty(0)
    need_x, need_weight, need_bias, need_a, need_b = needs
    if x.is_cuda and has_triton():
        dx, da, db = _gpu().backward(down, rows, weight, a, b, scale, need_x, need_a, need_b)
        dx, da, db = (none if t is None else t for t in (dx, da, db))
    else:
        ds = (b.t() @ down.t()).mul_(scale) if need_x or need_a else none  # dS^T
        da = ds @ rows if need_a else none
        db = ((a @ rows.t()) @ down).mul_(scale).t().contiguous() if need_b else none
        dx = (down @ weight).addmm_(ds.t(), a) if need_x else none
    return [
        dx.view(x.shape) if need_x else none,
        down.t() @ rows if need_weight else none.clone(),
        down.sum(0) if need_bias else none.clone(),
        da if need_a else none.clone(),
        db if need_b else none.clone(),
    ]


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _gradients_fake(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, needs: Sequence[bool]
) -> list[Tensor]:
    shapes = (x.shape, weight.shape, (weight.shape[0],), a.shape, b.shape)
    return [
        dy.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, bias, a, b, scale = inputs
    ctx.save_for_backward(x, weight, a, b)
    ctx.scale, ctx.has_bias = scale, bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], wanted[2] and ctx.has_bias, wanted[3], wanted[4]]
    grads = torch.ops.peftfx.lora_linear_backward(dy, x, weight, a, b, ctx.scale, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


_LIBRARY = torch.library.Library("peftfx", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale) -> Tensor"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, float scale, "
    "bool[] needs) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("lora_linear", _forward, _key)
    _LIBRARY.impl("lora_linear_backward", _gradients, _key)
torch.library.register_fake("peftfx::lora_linear", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("peftfx::lora_linear_backward", _gradients_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "peftfx::lora_linear", _backward, setup_context=_setup, lib=_LIBRARY
)
