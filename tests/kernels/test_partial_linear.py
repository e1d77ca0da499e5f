"""The linear whose weight trains at some places, against autograd of the dense formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftfx.kernels.partial_linear import partial_linear, reference

N, K = 6, 10
INDICES = {None: [3, 59, 17, 8, 40], 0: [4, 1], 1: [9, 0, 5]}


def operands(axis: int | None, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, own: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(own)

    indices = torch.tensor(INDICES[axis], dtype=torch.int32)
    shape = {None: (5,), 0: (2, K), 1: (N, 3)}[axis]
    wide = torch.promote_types(dtype, torch.float32)
    x = drawn(3, 4, K).requires_grad_()
    values = drawn(*shape, own=wide).requires_grad_()
    held = drawn(N).requires_grad_() if bias else torch.empty(0, dtype=dtype)
    return x, drawn(N, K), held, values, indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_values_and_gradients(axis: int | None, dtype: torch.dtype) -> None:
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for trains in (False, True):  # the weight, too
        x, weight, bias, values, indices = operands(axis, dtype)
        weight.requires_grad_(trains)
        wanted = [x, bias, values, *([weight] if trains else [])]
        results: list[list[Tensor]] = []
        for operator in (partial_linear, reference):
            y = operator(x, weight, bias, values, indices, axis)
            loss = (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum()
            results.append([y.detach(), *torch.autograd.grad(loss, wanted)])
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=limit, atol=limit * float(want.abs().max()))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_by_differences(axis: int | None) -> None:
    x, weight, bias, values, indices = operands(axis, torch.float64)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return partial_linear(x, weight, bias, values, indices, axis)

    assert torch.autograd.gradcheck(call, (x, values, bias))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_what_is_kept_for_backward(axis: int | None) -> None:
    """x alone, or the columns of it that are read; never a weight made for the call."""
    x, weight, _, values, indices = operands(axis, torch.float32, bias=False)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        partial_linear(x, weight, None, values, indices, axis)
    own = {t.data_ptr() for t in (x, weight, values, indices)}
    fresh = [t for t in kept if t.data_ptr() not in own]
    assert [t.shape for t in fresh] == ([] if axis != 1 else [(3, 4, 3)])
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        partial_linear(x, weight, None, values.detach(), indices, axis)
    assert all(t.data_ptr() != x.data_ptr() and t.shape[-1] != 3 for t in kept if t.dim() == 3)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_compiled_and_under_autocast(axis: int | None) -> None:
    x, weight, bias, values, indices = operands(axis, torch.float32)
    compiled = torch.compile(partial_linear, backend="aot_eager", fullgraph=True)
    want = partial_linear(x, weight, bias, values, indices, axis)
    got = compiled(x, weight, bias, values, indices, axis)
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(t.square().sum(), values)[0] for t in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = partial_linear(x, weight, bias, values, indices, axis)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=3e-2, atol=0.2)
