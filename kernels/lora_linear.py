"""One operator for a frozen linear and its low-rank branch: `peftfx::lora_linear`.

    y = x W^T + bias + s (x A^T) B^T        x [..., K], W [N, K], A [R, K], B [N, R]

Forward: S = x A^T, then the low-rank product is accumulated into the linear's own output, so no
second [M, N] tensor exists. Backward saves only x (S = x A^T is recomputed, R is small) and never
forms a gradient of shape [N, K] for the frozen weight:

    dS = s dy B,   dx = dy W + dS A,   dA = dS^T x,   dB = s dy^T S,   dbias = sum dy

The products of rank R are computed transposed, [R, M]: with the short axis first, a CPU's matrix
product is 2 to 5 times faster. On CUDA tensors, `triton_lora_linear` runs the kernels of
`gpu/lora_linear.py` instead. LoRA: Hu et al. 2021, arXiv:2106.09685. Split after the rank-R
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
from torch import Tensor, library


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
    return _compute(x, weight, bias, a, b, scale, False)


def triton_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """`lora_linear` by Triton kernels where x is on a CUDA device and computed in 16 bits.

    Elsewhere by torch's operators: without TF32, a GPU's float32 product gains nothing.
    """
    return _compute(x, weight, bias, a, b, scale, x.is_cuda)


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, triton: bool
) -> Tensor:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask for
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    a, b = a.to(x.dtype), b.to(x.dtype)
    triton = triton and x.dtype.itemsize == 2
    if type(x) is Tensor and not torch.compiler.is_compiling():
        return _Eager.apply(x, weight, bias, a, b, scale, triton)
    return torch.ops.peftfx.lora_linear(x, weight, bias, a, b, scale, triton)


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
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, triton: bool
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if triton:
        y = _gpu().forward(rows, weight, bias, a, b, scale)
    else:
        y = F.linear(rows, weight, bias)
        y.addmm_((a @ rows.t()).t(), b.t(), alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0])


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, triton: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, a and b, where needed."""
    rows, down = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    need_x, need_weight, need_bias, need_a, need_b = needs
    if triton:
        dx, da, db = _gpu().backward(down, rows, weight, a, b, scale, need_x, need_a, need_b)
    else:
        ds = (b.t() @ down.t()).mul_(scale) if need_x or need_a else down  # dS^T
        dx = (down @ weight).addmm_(ds.t(), a) if need_x else None
        da = ds @ rows if need_a else None
        db = ((a @ rows.t()) @ down).mul_(scale).t() if need_b else None
    return (
        None if dx is None else dx.view(x.shape),
        down.t() @ rows if need_weight else None,
        down.sum(0) if need_bias else None,
        da,
        db,
    )


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which costs a tenth of a small linear's time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
        scale: float, triton: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, a, b)
        ctx.options = scale, triton
        return _forward(x, weight, bias, a, b, scale, triton)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, a, b = ctx.saved_tensors
        scale, triton = ctx.options
        needs = ctx.needs_input_grad[:5]
        return (*_backward(grads[0], x, weight, a, b, scale, triton, needs), None, None)


def _operator_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, triton: bool,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    gradients = _backward(dy, x, weight, a, b, scale, triton, needs)
    return [dy.new_empty(0) if g is None else g.contiguous() for g in gradients]


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, triton: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, triton: bool,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    shapes = (x.shape, weight.shape, (weight.shape[0],), a.shape, b.shape)
    return [dy.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, bias, a, b, *options = inputs
    ctx.save_for_backward(x, weight, a, b)
    ctx.options, ctx.has_bias = options, bias is not None


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs = [*ctx.needs_input_grad[:5]]
    needs[2] = needs[2] and ctx.has_bias
    grads = torch.ops.peftfx.lora_linear_backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


_LIBRARY = library.Library("peftfx", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, "
    "bool triton) -> Tensor"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, float scale, "
    "bool triton, bool[] needs) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("lora_linear", _forward, _key)
    _LIBRARY.impl("lora_linear_backward", _operator_backward, _key)
library.register_fake("peftfx::lora_linear", _fake, lib=_LIBRARY)
library.register_fake("peftfx::lora_linear_backward", _fake_backward, lib=_LIBRARY)
library.register_autograd("peftfx::lora_linear", _differentiate, setup_context=_setup, lib=_LIBRARY)
