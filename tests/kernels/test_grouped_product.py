"""Rows by group: against the formula, under autograd, and in graphs whatever the groups are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftfx.kernels.grouped_product import OPERATOR, grouped_product, reference

ENDS = torch.tensor([3, 3, 10, 17], dtype=torch.int32)


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(20, 5, dtype=dtype), torch.randn(4, 5, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ends", [ENDS, ENDS.long() * 0, torch.tensor([0, 0, 0, 20])])
def test_it_is_the_formula(dtype: torch.dtype, ends: Tensor) -> None:
    x, w = operands(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        grouped_product(x, w, ends), reference(x, w, ends), rtol=tolerance, atol=tolerance * 4
    )


def test_gradients_are_those_of_the_formula() -> None:
    x, w = (t.requires_grad_() for t in operands())
    torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, ENDS), (x, w))
    for fixed in (x, w):  # only what is asked for is computed
        fixed.requires_grad_(False)
        other = w if fixed is x else x
        (mine,) = torch.autograd.grad(grouped_product(x, w, ENDS).pow(2).sum(), other)
        (want,) = torch.autograd.grad(reference(x, w, ENDS).pow(2).sum(), other)
        torch.testing.assert_close(mine, want)
        fixed.requires_grad_(True)
    grouped_product(x, w, ENDS).sum().backward()  # the gradient of a sum has strides of zero
    assert x.grad is not None and w.grad is not None and not w.grad[1].any()


def test_the_operator_keeps_its_promises() -> None:
    torch.library.opcheck(OPERATOR, (*(t.requires_grad_() for t in operands()), ENDS))


def test_one_graph_serves_all_groups() -> None:
    x, w = operands()
    compiled = torch.compile(grouped_product, fullgraph=True, backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for ends in (ENDS, ENDS.flip(0) * 0 + 7, torch.tensor([5, 9, 9, 20], dtype=torch.int32)):
        torch.testing.assert_close(compiled(x, w, ends), reference(x, w, ends))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
