"""Walsh-Hadamard transforms and random projections against numpy, and numbers that stay the same."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
import torch
from torch import Tensor

from peftfx.kernels import counter_random as numbers
from peftfx.kernels import hadamard as transform
from peftfx.kernels import random_projection as projection

from . import projected

PROJECT, BACK = (
    torch.ops.peftfx.random_projection.default,
    torch.ops.peftfx.random_projection_adjoint.default,
)


def test_the_words_are_those_of_splitmix64() -> None:
    """Of the seed 1234567, as other implementations of the generator have them."""
    known = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert [w % 2**64 for w in numbers.words(1234567, 0, 5).tolist()] == known
    assert torch.equal(numbers.words(7, 3, 4), numbers.words(7, 0, 9)[3:7])


def digest(tensor: Tensor) -> str:
    return sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def test_the_numbers_of_version_1() -> None:
    """Files name a version and a seed: these numbers may never change."""
    assert numbers.VERSION == 1
    assert numbers.stream(1, 2, 3) == 15020427595393229491
    assert numbers.normals(1, 0, 6).tolist() == [686, 2708, 7769, -572, -575, 2930]
    assert numbers.signs(1, 8).tolist() == [-1, -1, -1, 1, 1, -1, -1, -1]
    assert numbers.permutation(1, 8).tolist() == [7, 0, 1, 5, 6, 2, 4, 3]
    signs, order, g = projection.tables(3, 5, 70000, 100)
    assert order.shape == g.shape == (2, 65536) and len(signs) == 100
    assert all(len(row.unique()) == 65536 for row in order)  # permutations
    found = [digest(numbers.normals(9, 0, 4096)), digest(signs), digest(order)]
    assert found == ["6d358c032bae502e", "29ecb3bfbb18c1b8", "c2747b2c1121be30"]
    assert digest(projection.dense_matrix(3, 5, 0, 50, 7)) == "ea6a1599f1a4c8f9"


def test_normal_numbers_are_normal() -> None:
    sample = numbers.normals(3, 0, 1 << 20).double() / numbers.ONE
    for moment, want in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs(float(sample.pow(moment).mean()) - want) < 0.02


@pytest.mark.parametrize("size", [1, 2, 8, 64, 512, 4096])
def test_the_transform_is_its_formula(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    got = transform.hadamard(x)
    torch.testing.assert_close(got, transform.reference(x))
    for row, own in zip(x, got, strict=True):
        np.testing.assert_allclose(own, projected.transformed(row.numpy()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.hadamard(got), size * x)
    half = transform.hadamard(x.bfloat16())
    torch.testing.assert_close(half, transform.reference(x.bfloat16().double()).bfloat16())


def test_the_transform_is_its_own_adjoint() -> None:
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(transform.hadamard, (x,))
    torch.autograd.gradgradcheck(transform.hadamard, (x,))
    torch.library.opcheck(transform.OPERATOR, (x,))
    turned = torch.randn(32, 3).mT.requires_grad_()
    torch.testing.assert_close(transform.hadamard(turned), transform.reference(turned))
    with pytest.raises(ValueError, match="48 entries, and must have a power of two"):
        transform.hadamard(torch.zeros(2, 48))


SIZES = [(1, 1), (5, 3), (64, 64), (70, 30), (100, 3000), (300, 70000), (90000, 500)]


@pytest.mark.parametrize(("dimension", "size"), SIZES)
def test_fastfood_is_its_formula(dimension: int, size: int) -> None:
    theta = torch.randn(dimension, dtype=torch.float64)
    want = torch.tensor(projected.fastfood(theta.numpy(), 11, 2, size))
    torch.testing.assert_close(projection.random_projection(theta, 11, 2, size), want)
    if dimension * size < 1e6:
        torch.testing.assert_close(projection.reference(theta, 11, 2, size), want)
    single = projection.random_projection(theta.float(), 11, 2, size)
    torch.testing.assert_close(single, want.float(), rtol=1e-3, atol=1e-5)


def test_the_dense_one_is_its_formula() -> None:
    theta = torch.randn(700, dtype=torch.float64)
    want = torch.tensor(projected.dense(theta.numpy(), 11, 2, 3000))  # in several pieces
    torch.testing.assert_close(projection.random_projection(theta, 11, 2, 3000, dense=True), want)
    torch.testing.assert_close(projection.reference(theta, 11, 2, 3000, dense=True), want)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("dimension", "size"), [(5, 3), (3, 40), (300, 70000)])
def test_backward_is_the_adjoint(dimension: int, size: int, dense: bool) -> None:
    """<P x, y> = <x, P^T y>, and the gradient of each is the other."""
    if dense and size > 1000:
        size = 900
    x = torch.randn(dimension, dtype=torch.float64, requires_grad=True)
    y = torch.randn(size, dtype=torch.float64, requires_grad=True)
    forward = PROJECT(x, 4, 1, size, dense)
    back = BACK(y, 4, 1, dimension, dense)
    torch.testing.assert_close(forward @ y, x @ back)
    torch.testing.assert_close(torch.autograd.grad(forward, x, y.detach())[0], back.detach())
    torch.testing.assert_close(torch.autograd.grad(back, y, x.detach())[0], forward.detach())
    torch.library.opcheck(PROJECT, (x, 4, 1, size, dense))
    torch.library.opcheck(BACK, (y, 4, 1, dimension, dense))


def test_nothing_is_kept_for_backward() -> None:
    kept: list[Tensor] = []
    theta = torch.randn(50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = projection.random_projection(theta, 0, 0, 5000)
    assert not kept and y.grad_fn is not None


def test_columns_are_nearly_orthonormal_and_rows_differ() -> None:
    """Over blocks, too: 150000 entries are two blocks and a part of one."""
    size, dimension = 150000, 64
    units = torch.eye(dimension)
    p = torch.stack([projection.random_projection(e, 0, 3, size) for e in units], 1)
    gram = p.T @ p
    assert float((gram.diagonal() - 1).abs().max()) < 0.01
    assert float((gram - gram.diagonal().diag()).abs().max()) < 5 * size**-0.5
    rows = p[::37] * (size / dimension) ** 0.5  # of length 1 in the mean
    others = rows @ rows.T
    others.fill_diagonal_(0)
    assert float(others.abs().max()) < 6.5 * dimension**-0.5
    other = torch.stack([projection.random_projection(e, 0, 4, size) for e in units], 1)
    assert float((p.T @ other).abs().max()) < 6 * size**-0.5  # of another tensor
