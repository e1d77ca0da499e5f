"""Random projections of one vector to many numbers, made from a seed: `peftfx::random_projection`.

Fastfood (Le, Sarlos and Smola, ICML 2013, arXiv:1408.3060), as intrinsic dimensions use it (Li et
al., ICLR 2018, arXiv:1804.08838): theta [d] to D entries in blocks of L, the last one cut,

    P theta = s_b H_L G_b Pi_b H_L B theta,   s_b = 1 / sqrt(D sum G_b^2)

with theta padded to L, signs B, permutations Pi_b, normal G_b, H the Walsh-Hadamard matrix
(`hadamard.py`). Columns of P have length 1 in the mean, and are nearly orthogonal. L is the power
of two of d or D, whichever is larger, but of at most `BLOCK` entries of D: larger tensors are
blocks one below the other, as in Le et al., which stay in a cache. As theta fills only the first
d' = 2^ceil(log2 d) places, H_L B theta is H_d' B theta over and over, and only `Pi mod d'` counts.

The numbers are those of `counter_random.py`. Of a seed: a permutation S of L places, normal T [2 L]
and signs Z [2 L]; of a tensor: a place p; of a block: places c, o and z:

    B(t) = Z[p + t],   Pi_b(j) = S(c + j mod L),   G_b(j) = T[o + j] Z[z + j]

so that making them is reading them, and no block's rows are those of another.

Dense: entry (r, t) of P is normal of deviation 0.01, word `r d + t` of the tensor's stream.

P is linear, so that neither it nor theta is saved for backward: the adjoint makes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from .counter_random import ONE, VERSION, normals, permutation, signs, stream, words
from .hadamard import hadamard_matrix, transform

BLOCK = 1 << 16
DEVIATION = 0.01
_PERMUTATION, _NORMAL, _SIGNS, _PLACES, _DENSE = range(5)

_LIBRARY = library.Library("peftfx", "FRAGMENT")
_OPTIONS = "int seed, int index, int {}, bool dense) -> Tensor"
_LIBRARY.define(f"random_projection(Tensor theta, {_OPTIONS.format('size')}")
_LIBRARY.define(f"random_projection_adjoint(Tensor g, {_OPTIONS.format('dimension')}")


def reference(theta: Tensor, seed: int, index: int, size: int, dense: bool = False) -> Tensor:
    """The formula, with whole matrices."""
    if dense:
        return dense_matrix(seed, index, 0, size, len(theta)).to(theta) @ theta
    signs_of, place, g = tables(seed, index, size, len(theta))
    h = hadamard_matrix(place.shape[1]).to(theta)
    u = h @ F.pad(theta * signs_of.to(theta), (0, len(h) - len(theta)))
    return ((g.to(theta) * u[place]) @ h).flatten()[:size]


def tables(seed: int, index: int, size: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """B `[d]`, and for all blocks Pi `[blocks, L]` (int64) and s G `[blocks, L]` (float64)."""
    length, first, places = _plan(seed, index, size, dimension)
    s, t, z = _pools(seed, length)
    order = torch.stack([s.roll(-c) for c, _, _ in places])
    g = torch.stack([t[o : o + length] * z[k : k + length] for _, o, k in places]).double()
    return z[first : first + dimension], order, g / (size * g.square().sum(1, True)).sqrt()


def dense_matrix(seed: int, index: int, start: int, stop: int, dimension: int) -> Tensor:
    """Rows of the dense P, float64 `[stop - start, d]`."""
    key, count = stream(VERSION, _DENSE, seed, index), (stop - start) * dimension
    entries = normals(key, start * dimension, count).view(-1, dimension)
    return entries.double() * (DEVIATION / ONE)


def random_projection(
    theta: Tensor, seed: int, index: int, size: int, dense: bool = False
) -> Tensor:
    """`P theta [size]`, differentiable in theta.

    Args:
        theta: `[d]`, any floating dtype, which is that of the result; half precision is widened.
        seed, index: of the projection, and of a tensor of those that share theta.
        size: D.
        dense: normal entries instead of Fastfood, which takes D d numbers to make.
    """
    return torch.ops.peftfx.random_projection(theta, seed, index, size, dense)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


Places = tuple[int, int, int]


@lru_cache(maxsize=4096)
def _plan(seed: int, index: int, size: int, dimension: int) -> tuple[int, int, tuple[Places, ...]]:
    """L, p, and (c, o, z) of each block."""
    length = max(_power(dimension), _power(min(size, BLOCK)))
    key = stream(VERSION, _PLACES, seed, index)
    drawn = words(key, 0, 1 + 3 * -(-size // length)) & (length - 1)
    first, rest = int(drawn[0]), drawn[1:].view(-1, 3).tolist()
    return length, first, tuple((c, o, z) for c, o, z in rest)


@lru_cache(maxsize=16)
def _pools(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """S `[L]`, T and Z `[2 L]`, int64."""
    order = permutation(stream(VERSION, _PERMUTATION, seed), length)
    normal = normals(stream(VERSION, _NORMAL, seed), 0, 2 * length)
    return order, normal, signs(stream(VERSION, _SIGNS, seed), 2 * length)


@dataclass(frozen=True)
class _Pools:
    """What the tensors of one seed share, ready to compute with.

    Attributes:
        order: `S mod d'`.
        inverse: of S.
        normal, sign: T and Z in the dtype that is computed in.
        squares: sums of squares of T before each place, `2 L + 1` whole numbers.
    """

    order: Tensor
    inverse: Tensor
    normal: Tensor
    sign: Tensor
    squares: Tensor


@lru_cache(maxsize=16)
def _ready(seed: int, length: int, narrow: int, dtype: torch.dtype, device: torch.device) -> _Pools:
    order, normal, sign = _pools(seed, length)
    squares = F.pad(normal.square().cumsum(0), (1, 0))
    return _Pools(
        (order & (narrow - 1)).to(device), order.argsort().to(device), normal.to(device, dtype),
        sign.to(device, dtype), squares,
    )  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """One block of P.

    Attributes:
        own: its entries of the tensor.
        rows: how many are computed: a power of two.
        shift: c.
        normal, sign: what G is the product of, `[L]`.
        scale: s.
    """

    own: slice
    rows: int
    shift: int
    normal: Tensor
    sign: Tensor
    scale: float


class _Fastfood:
    """P of one tensor."""

    def __init__(self, like: Tensor, seed: int, index: int, size: int, dimension: int) -> None:
        self.length, first, self.places = _plan(seed, index, size, dimension)
        self.size, self.narrow = size, _power(dimension)
        self.pools = _ready(seed, self.length, self.narrow, like.dtype, like.device)
        self.signs = self.pools.sign[first : first + dimension]

    def blocks(self) -> Iterator[_Block]:
        """All blocks; a smaller last one needs fewer rows."""
        pools, length = self.pools, self.length
        for number, (c, o, z) in enumerate(self.places):
            start = number * length
            own = slice(start, min(start + length, self.size))
            squares = int(pools.squares[o + length] - pools.squares[o])
            normal, sign = pools.normal[o : o + length], pools.sign[z : z + length]
            rows = _power(own.stop - start)
            yield _Block(own, rows, c, normal, sign, (self.size * squares) ** -0.5)

    def forward(self, theta: Tensor) -> Tensor:
        """`P theta`. Of H_L, the first rows are H of their number, over and over."""
        padded = F.pad(theta * self.signs, (0, self.narrow - len(theta)))
        mixed = transform(padded).index_select(0, self.pools.order)
        mixed = torch.cat([mixed, mixed])
        y = theta.new_empty(self.size)
        for b in self.blocks():
            v = mixed[b.shift : b.shift + self.length] * b.normal
            v = v.mul_(b.sign).view(-1, b.rows)
            v, own = v[0] if len(v) == 1 else v.sum(0), y[b.own]
            if len(own) == b.rows:
                transform(v, b.scale, own)
            else:
                own.copy_(transform(v, b.scale)[: len(own)])
        return y

    def adjoint(self, g: Tensor, dimension: int) -> Tensor:
        """`P^T g`."""
        mixed = g.new_zeros(2 * self.length)
        for b in self.blocks():
            own = g[b.own]
            whole = own if len(own) == b.rows else F.pad(own, (0, b.rows - len(own)))
            v = transform(whole, b.scale)
            v = v if b.rows == self.length else v.repeat(self.length // b.rows)
            mixed[b.shift : b.shift + self.length].addcmul_(v.mul_(b.normal), b.sign)
        mixed = mixed.view(2, -1).sum(0)[self.pools.inverse]
        return transform(mixed.view(-1, self.narrow).sum(0))[:dimension] * self.signs


def _forward(theta: Tensor, seed: int, index: int, size: int, dense: bool) -> Tensor:
    if theta.dtype.itemsize < 4:
        return _forward(theta.float(), seed, index, size, dense).to(theta.dtype)
    if not dense:
        return _Fastfood(theta, seed, index, size, len(theta)).forward(theta)
    rows = _dense(theta, seed, index, size, len(theta))
    return torch.cat([theta.new_empty(0), *(r @ theta for _, r in rows)])


def _adjoint(g: Tensor, seed: int, index: int, dimension: int, dense: bool) -> Tensor:
    if g.dtype.itemsize < 4:
        return _adjoint(g.float(), seed, index, dimension, dense).to(g.dtype)
    if not dense:
        return _Fastfood(g, seed, index, len(g), dimension).adjoint(g, dimension)
    rows = _dense(g, seed, index, len(g), dimension)
    return sum((g[own] @ r for own, r in rows), g.new_zeros(dimension))


def _dense(
    like: Tensor, seed: int, index: int, size: int, dimension: int
) -> Iterator[tuple[slice, Tensor]]:
    """The dense matrix, some rows at a time."""
    step = max(1, (1 << 20) // dimension)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), dense_matrix(seed, index, start, stop, dimension).to(like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    operand, ctx.seed, ctx.index, _, ctx.dense = inputs
    ctx.length = operand.shape[0]


def _pulled(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    adjoint = torch.ops.peftfx.random_projection_adjoint
    return adjoint(g, ctx.seed, ctx.index, ctx.length, ctx.dense), None, None, None, None


def _pushed(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    project = torch.ops.peftfx.random_projection
    return project(g, ctx.seed, ctx.index, ctx.length, ctx.dense), None, None, None, None


for _name, _call, _back in (
    ("random_projection", _forward, _pulled),
    ("random_projection_adjoint", _adjoint, _pushed),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _call, _key)
    library.register_fake(
        f"peftfx::{_name}", lambda x, seed, index, count, dense: x.new_empty(count), lib=_LIBRARY
    )
    library.register_autograd(f"peftfx::{_name}", _back, setup_context=_setup, lib=_LIBRARY)

OPERATOR = torch.ops.peftfx.random_projection.default
"""The operator itself, for graphs."""
