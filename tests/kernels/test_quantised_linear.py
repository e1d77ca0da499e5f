"""`peftfx::quantised_linear`: the formula, its gradients, what it keeps, and how it is packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

from peftfx.kernels import quantised_linear as kernel
from peftfx.kernels import stored_linear
from peftfx.rewriter.weights.integers import Quantised, pack, quantise, unpack

Op = Callable[..., Tensor]
quantised_linear: Op = kernel.quantised_linear
reference: Op = kernel.reference


def operands(
    *rows: int,
    bits: int = 4,
    packed: bool = False,
    size: int = 7,
    group: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    """x, codes, scale, zero, bias, bits, group; the last group of a row is shorter."""
    torch.manual_seed(0)
    groups = -(-size // group)
    wide = torch.promote_types(dtype, torch.float32)
    codes = torch.randint(0, 256, (5, groups, -(-group * bits // 8)), dtype=torch.uint8)
    scale = torch.randn(5, groups, dtype=wide, requires_grad=True)
    zero = torch.randn(5, groups, dtype=wide, requires_grad=True)
    if packed:
        zero = torch.randint(0, 256, (5, -(-groups * bits // 8)), dtype=torch.uint8)
    x = torch.randn(*rows, size, dtype=dtype, requires_grad=True)
    bias = torch.randn(5, dtype=dtype, requires_grad=True)
    return x, codes, scale, zero, bias, bits, group


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(bits: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_linear, "SLICE", 14)  # two rows of the weight at a time
    given = operands(2, 3, bits=bits, packed=packed)
    torch.testing.assert_close(quantised_linear(*given), reference(*given))
    assert torch.autograd.gradcheck(quantised_linear, given)
    bare = (*given[:4], None, *given[5:])
    torch.testing.assert_close(quantised_linear(*bare), reference(*bare))


def test_gradients_are_those_of_the_paper() -> None:
    """One group a row: ds_i = sum_t dy_ti y_ti / s_i, without the bias."""
    x, codes, scale, zero, _, bits, group = operands(6, group=7, packed=True)
    y = quantised_linear(x, codes, scale, zero, None, bits, group)
    dy = torch.randn_like(y)
    y.backward(dy)
    want = (dy * y.detach()).sum(0) / scale.detach()[:, 0]
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad[:, 0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_follows_the_plain_chain(dtype: torch.dtype) -> None:
    results: list[list[Tensor]] = []
    for operator in (quantised_linear, reference):
        given = operands(2, 6, dtype=dtype, packed=True)
        y = operator(*given)
        y.float().pow(2).sum().backward()
        assert y.dtype == dtype and given[2].grad.dtype == torch.float32
        results.append([y.detach().float(), *(given[i].grad.float() for i in (0, 2, 4))])
    for ours, plain in zip(*results, strict=True):
        gap = float((ours - plain).norm() / plain.norm())
        assert gap < {torch.float32: 1e-5}.get(dtype, 0.02)


def kept(trained: bool) -> int:
    """Bytes kept for backward beside the stored tensors and x."""
    given = operands(4, 6, packed=True, size=64, group=16)
    given[2].requires_grad_(trained)
    given[4].requires_grad_(False)
    mine = {t.untyped_storage().data_ptr() for t in given[1:5]}
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        quantised_linear(*given).sum()
    return sum(seen.values())


def test_backward_keeps_no_dense_weight() -> None:
    assert kept(trained=False) == 0  # a frozen base needs the integers alone
    assert kept(trained=True) == 4 * 6 * 64 * 8  # and x to train its scales


@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_is_well_registered_and_compiles(packed: bool) -> None:
    library.opcheck(kernel.OPERATOR, operands(2, 3, packed=packed))
    compiled = torch.compile(quantised_linear, fullgraph=True, backend="aot_eager")
    given = operands(2, 3, packed=packed)
    y = compiled(*given)
    torch.testing.assert_close(y, reference(*given))
    y.sum().backward()
    assert given[2].grad is not None


def test_autocast_is_respected() -> None:
    given = operands(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised_linear(*given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(*given), rtol=0.1, atol=0.1)
    y.sum().backward()
    assert given[0].grad.dtype == given[2].grad.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_the_dense_weight_is_the_same_one(packed: bool) -> None:
    x, codes, scale, zero, _, bits, group = operands(4, packed=packed)
    weight = torch.ops.peftfx.dequantise(codes, scale, zero, bits, group, 7)
    held = Quantised(codes, scale, zero, bits, group, 7)
    torch.testing.assert_close(weight, held.dense(), rtol=0, atol=0)
    y = quantised_linear(x, codes, scale, zero, None, bits, group)
    torch.testing.assert_close(x @ weight.T, y)
    grads = [torch.autograd.grad(v.sum(), scale)[0] for v in (x @ weight.T, y)]
    torch.testing.assert_close(*grads)


# Rounding.


def by_hand(weight: Tensor, bits: int, group: int) -> Tensor:
    """Plain rounding to nearest between the smallest and the largest value of each group."""
    w = weight.double().unflatten(1, (-1, group))
    low, high = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((w / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).flatten(1)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.45), (4, 0.09), (8, 0.006)])
def test_clipping_beats_plain_rounding(bits: int, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    made = quantise(weight, bits, 32)
    error = float((made.dense() - weight).norm() / weight.norm())
    plain = float((by_hand(weight, bits, 32) - weight).norm() / weight.norm())
    assert error < plain and error < most
    again = quantise(weight, bits, 32)
    assert torch.equal(made.codes, again.codes) and torch.equal(made.zero, again.zero)


@pytest.mark.parametrize(
    ("size", "group", "bits"),
    [(40, 16, 4), (40, 48, 4), (7, None, 4), (7, None, 2), (96, 48, 8), (100, 48, 4)],
)
def test_any_width_can_be_stored_and_regrouped(size: int, group: int | None, bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, size)
    made = quantise(weight, bits, group)
    assert made.codes.shape[1] == -(-size // made.group)
    assert float((made.dense() - weight).norm() / weight.norm()) < (0.5 if bits == 2 else 0.12)
    x = torch.eye(size)
    parts = (made.codes, made.scale, made.zero, None, bits, made.group)
    torch.testing.assert_close(quantised_linear(x, *parts).T, made.dense(), rtol=0, atol=0)
    if made.group % 16 == 0:
        finer: Quantised = made.regrouped(16)
        assert finer.group == 16 and torch.equal(finer.dense(), made.dense())


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_constant_groups_are_exact(value: float) -> None:
    weight = torch.full((2, 8), value)
    torch.testing.assert_close(quantise(weight, 4, 4).dense(), weight)


def test_the_layout_is_low_bits_first() -> None:
    values = torch.tensor([1, 2, 3, 15, 7], dtype=torch.uint8)
    assert pack(values, 4).tolist() == [0x21, 0xF3, 0x07]
    assert pack(values % 4, 2).tolist() == [0b11111001, 0b11]
    for bits in (2, 4, 8):
        held = values & ((1 << bits) - 1)
        assert torch.equal(unpack(pack(held, bits), bits, 5), held)
        assert torch.equal(kernel.unpack(pack(held, bits), bits, 5), held)
