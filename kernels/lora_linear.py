"""One operator for a frozen linear and its low-rank branch: `peftfx::lora_linear`.

    y = x W^T + bias + s (x A^T) B^T        x [..., K], W [N, K], A [R, K], B [N, R]

Forward: S = x A^T, then the low-rank product is accumulated into the linear's own output, so no
second [M, N] tensor exists. Backward never forms a gradient of shape [N, K] for the frozen weight:

    dS = s dy B,   dx = dy W + dS A,   dA = dS^T x,   dB = s dy^T S,   dbias = sum dy

A `Form` says whether S is kept for the backward pass or computed again, which axis of the thin
products is first, and whether W + s B A takes the place of W in both passes (RunLoRA, Cherniuk et
al. 2023, arXiv:2312.03415); `low_rank_forms` chooses. On CUDA tensors, `triton_lora_linear` runs
the kernels of `gpu/lora_linear.py` instead. LoRA: Hu et al. 2021, arXiv:2106.09685. Split after the
rank-R product: LoRAFusion, arXiv:2510.00206.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor


class Form(NamedTuple):
    """How the low-rank product is computed.

    Attributes:
        kept: S is kept for the backward pass.
        rank_first: thin products are computed `[R, M]`, else `[M, R]`.
        merged: W + s B A is formed, in float32 and wider alone.
    """

    kept: bool = False
    rank_first: bool = True
    merged: bool = False

    def __str__(self) -> str:
        order = "[rank, tokens]" if self.rank_first else "[tokens, rank]"
        product = "x (W + s B A)^T" if self.merged else "x W^T + s (x A^T) B^T"
        return f"{product}, x A^T {'kept' if self.kept else 'computed again'} as {order}"

    def of(self, weight: Tensor) -> Form:
        """The form where the weight is so precise that merging rounds as the product does."""
        return self if weight.dtype.itemsize >= 4 else self._replace(merged=False)


PLAIN = Form()


def thin(x: Tensor, a: Tensor, form: Form) -> Tensor:
    """`x a^T` for `a [R, K]`, `[M, R]`."""
    return (a @ x.t()).t() if form.rank_first else x @ a.t()


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The formula, term by term, in the tensors' own dtype."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    form: Form = PLAIN,
) -> Tensor:  # fmt: skip
    """`x W^T + bias + scale (x A^T) B^T`, differentiable in every tensor.

    Args:
        x: `[..., K]`, any floating dtype; weight: `[N, K]`; bias: `[N]` or None.
        a: `[R, K]`; b: `[N, R]`, also wider than x, whose dtype is computed in (autocast is
            respected).
        scale: of the low-rank product.
        form: how eager training computes it; inference and compilers have the first.

    Returns:
        `[..., N]`.
    """
    return _compute(x, weight, bias, a, b, scale, False, form)


def triton_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """`lora_linear` by Triton kernels where x is on a CUDA device and computed in 16 bits.

    Elsewhere by torch's operators: without TF32, a GPU's float32 product gains nothing.
    """
    return _compute(x, weight, bias, a, b, scale, x.is_cuda)


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    triton: bool, form: Form = PLAIN,
) -> Tensor:  # fmt: skip
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask for
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    a, b = a.to(x.dtype), b.to(x.dtype)
    triton = triton and x.dtype.itemsize == 2
    eager = type(x) is Tensor or (type(x) is FakeTensor and not triton)  # fake ones count memory
    if eager and not torch.compiler.is_compiling():
        # What a machine finds cheapest for training does not change a bit of what it infers.
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, b, weight))
        form = form if learning else PLAIN
        return _Eager.apply(x, weight, bias, a, b, scale, triton, form)
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
    return _product(x, weight, bias, a, b, scale, triton, PLAIN)[0]


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    triton: bool, form: Form,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result, and S where there is one."""
    rows, s = x.reshape(-1, x.shape[-1]), None
    if triton:
        y = _gpu().forward(rows, weight, bias, a, b, scale)
    elif form.of(weight).merged:
        y = F.linear(rows, torch.addmm(weight, b, a, alpha=scale), bias)
    else:
        y, s = F.linear(rows, weight, bias), thin(rows, a, form)
        y.addmm_(s, b.t(), alpha=scale)
    shape = (*x.shape[:-1], weight.shape[0])
    return torch.ops.aten._unsafe_view.default(y, shape), s  # no view: it may be written to


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, triton: bool,
    needs: Sequence[bool], form: Form = PLAIN, s: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, a and b, where needed."""
    rows, down = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    need_x, need_weight, need_bias, need_a, need_b = needs
    if triton:
        dx, da, db = _gpu().backward(down, rows, weight, a, b, scale, need_x, need_a, need_b)
    else:
        merged = form.of(weight).merged
        ds = thin(down, b.t(), form).mul_(scale) if need_a or (need_x and not merged) else down
        dx = _input_gradient(down, weight, a, b, scale, ds, merged) if need_x else None
        da = ds.t() @ rows if need_a else None
        db = None
        if need_b:
            s = thin(rows, a, form) if s is None else s
            db = (s.t() @ down).mul_(scale).t()
    return (
        None if dx is None else dx.view(x.shape),
        down.t() @ rows if need_weight else None,
        down.sum(0) if need_bias else None,
        da,
        db,
    )


def _input_gradient(
    down: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, ds: Tensor, merged: bool
) -> Tensor:
    if merged:
        return down @ torch.addmm(weight, b, a, alpha=scale)
    return (down @ weight).addmm_(ds, a)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which costs a tenth of a small linear's time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
        scale: float, triton: bool, form: Form,
    ) -> Tensor:  # fmt: skip
        y, s = _product(x, weight, bias, a, b, scale, triton, form)
        ctx.save_for_backward(x, weight, a, b, s if form.kept else None)
        ctx.options = scale, triton, form
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, s = ctx.saved_tensors
        scale, triton, form = ctx.options
        needs = ctx.needs_input_grad[:5]
        gradients = _backward(grads[0], x, weight, a, b, scale, triton, needs, form, s)
        return (*gradients, None, None, None)


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
