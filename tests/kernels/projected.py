"""Fastfood and its numbers once more, from the formulas in `kernels/counter_random.py` and
`kernels/random_projection.py` with numpy alone, for the tests to compare with."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
Array = NDArray[Any]


def mixed(z: Array) -> Array:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


def words(key: int, count: int) -> Array:
    counter = np.arange(1, count + 1, dtype=np.uint64)
    return mixed(np.uint64(key) + counter * np.uint64(GAMMA))


def stream(*numbers: int) -> int:
    key = 0
    for number in numbers:
        one = np.array([((key ^ number) + GAMMA) % 2**64], dtype=np.uint64)
        key = int(mixed(one)[0])
    return key


def normals(key: int, count: int) -> Array:
    table = np.array([round(NormalDist().inv_cdf((i + 0.5) / 4096) * 4096) for i in range(4096)])
    return table[(words(key, count) >> np.uint64(52)).astype(np.int64)]


def signs(key: int, count: int) -> Array:
    return np.where(words(key, count) >> np.uint64(63) == 1, -1, 1)


def transformed(x: Array) -> Array:
    """Un-normalised Walsh-Hadamard, butterfly by butterfly."""
    y, half = x.astype(np.float64), 1
    while half < len(y):
        pairs = y.reshape(-1, 2, half)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
        half *= 2
    return y


def power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def fastfood(theta: Array, seed: int, index: int, size: int) -> Array:
    """`P theta`, block by block, with all of the permutation and both transforms whole."""
    length = max(power(len(theta)), power(min(size, 65536)))
    order = np.argsort(words(stream(1, 0, seed), length).astype(np.int64), kind="stable")
    t, z = normals(stream(1, 1, seed), 2 * length), signs(stream(1, 2, seed), 2 * length)
    places = words(stream(1, 3, seed, index), 1 + 3 * -(-size // length)) % np.uint64(length)
    first, *rest = (int(p) for p in places)
    padded = np.zeros(length)
    padded[: len(theta)] = theta * z[first : first + len(theta)]
    u, blocks = transformed(padded), list[Array]()
    for c, o, k in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
        g = t[o : o + length] * z[k : k + length]
        permuted = u[[order[(j + c) % length] for j in range(length)]]
        blocks.append(transformed(g * permuted) / np.sqrt(size * np.sum(g.astype(float) ** 2)))
    return np.concatenate(blocks)[:size]


def dense(theta: Array, seed: int, index: int, size: int) -> Array:
    entries = normals(stream(1, 4, seed, index), size * len(theta)).reshape(size, -1)
    return entries / 4096 * 0.01 @ theta
