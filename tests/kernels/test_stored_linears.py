"""Linears over codes of a table, signs, and 2 of 4 entries, against a weight formed by counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, library

from peftfx.kernels import codebook_linear, onebit_linear, sparse24_linear, stored_linear

KERNELS: dict[str, Any] = {
    "codebook": codebook_linear, "onebit": onebit_linear, "sparse24": sparse24_linear,
}  # fmt: skip


def fields(packed: Tensor, bits: int, count: int) -> list[list[int]]:
    """The first values of each row of bytes, low bits first."""
    rows = packed.reshape(-1, packed.shape[-1]).tolist()
    return [[b >> s & (1 << bits) - 1 for b in r for s in range(0, 8, bits)][:count] for r in rows]


def dense(kind: str, given: Sequence[Any], size: int) -> Tensor:
    """W, entry by entry, in float64."""
    given = [g.detach() if isinstance(g, Tensor) else g for g in given]
    group = given[-1]
    rows, groups = given[1].shape[0], -(-size // group)
    weight = torch.zeros(rows, groups * group, dtype=torch.float64)
    if kind == "sparse24":
        places = fields(given[2], 2, 2 * groups)
        for i in range(rows):
            for k in range(2 * groups):
                weight[i, k // 2 * group + places[i][k]] = given[1][i, k // 2, k % 2].double()
        return weight[:, :size]
    found = fields(given[1], 1 if kind == "onebit" else given[-2], group)
    for i in range(rows):
        for j in range(size):
            code = found[i * groups + j // group][j % group]
            value = 2 * code - 1 if kind == "onebit" else float(given[3][code])
            weight[i, j] = float(given[2][i, j // group]) * value
    return weight[:, :size]


def operands(kind: str, dtype: torch.dtype = torch.float64, size: int = 10) -> list[Any]:
    """(x, parts, bias, numbers) of 5 outputs, with a group that is not full."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, to: torch.dtype = wide) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.to(to).requires_grad_()

    def byte(*shape: int) -> Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    x, bias = normal(2, 3, size, to=dtype), normal(5, to=dtype)
    if kind == "codebook":
        return [x, byte(5, 2, 4), normal(5, 2), normal(16), bias, 4, 8]
    if kind == "onebit":
        return [x, byte(5, 2, 1), normal(5, 2), bias, 8]
    pairs = torch.tensor([0b0100, 0b1100, 0b1001, 0b1110], dtype=torch.uint8)  # distinct places
    both = pairs[torch.randint(4, (2, 5, 2), generator=generator)]
    return [x, normal(5, 3, 2), both[0] | both[1] << 4, bias, 4]


@pytest.mark.parametrize("kind", list(KERNELS))
def test_values_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_linear, "SLICE", 20)  # two rows of the weight at a time
    given = operands(kind)
    y = KERNELS[kind].OPERATOR(*given)
    want = given[0] @ dense(kind, given, 10).T + given[-2 if kind != "codebook" else -3]
    torch.testing.assert_close(y, want)
    trained = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    plain = KERNELS[kind].reference(*given)
    ours, theirs = (torch.autograd.grad(v, trained, dy) for v in (y, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(
        lambda *moved: KERNELS[kind].OPERATOR(*_replaced(given, moved)), trained
    )


def _replaced(given: Sequence[Any], moved: Sequence[Tensor]) -> list[Any]:
    left = list(moved)
    return [left.pop(0) if isinstance(g, Tensor) and g.requires_grad else g for g in given]


@pytest.mark.parametrize("kind", list(KERNELS))
def test_the_operator_is_well_registered(kind: str) -> None:
    library.opcheck(KERNELS[kind].OPERATOR, tuple(operands(kind, torch.float32)))


@pytest.mark.parametrize("kind", list(KERNELS))
def test_low_precision_and_autocast(kind: str) -> None:
    given = operands(kind, torch.bfloat16)
    y = KERNELS[kind].OPERATOR(*given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, KERNELS[kind].reference(*given), rtol=0.05, atol=0.05)
    given = operands(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = KERNELS[kind].OPERATOR(*given)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), KERNELS[kind].reference(*given), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", list(KERNELS))
def test_backward_keeps_only_what_is_stored(kind: str) -> None:
    given = operands(kind, torch.float32)
    for tensor in given[1:]:
        if isinstance(tensor, Tensor):
            tensor.requires_grad_(False)
    stored = {t.data_ptr() for t in given[1:] if isinstance(t, Tensor)}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        KERNELS[kind].OPERATOR(*given).sum()
    assert kept and all(t.data_ptr() in stored for t in kept)
