"""Random numbers from counters, in integers alone: the same on every machine, device and version.

Word c of the stream `key` is splitmix64 (Steele, Lea and Flood, OOPSLA 2014) at `key + (c + 1) g`:

    z = key + (c + 1) g;   z = (z ^ z >> 30) m1;   z = (z ^ z >> 27) m2;   word = z ^ z >> 31

modulo 2^64, with g, m1, m2 of that paper. Normal numbers are quantiles, rounded to integers: one of
4096 by the top 12 bits of a word. This is version 1; files that name it mean these numbers.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

VERSION = 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64 - 1

ONE = 4096
"""What normal numbers are multiplied by, so that they are integers; how many there are, too."""


def stream(*numbers: int) -> int:
    """The key of a stream: a word that depends on all of these numbers and on their order."""
    key = 0
    for number in numbers:
        key = _mixed((key ^ (number & _WORD)) + _GAMMA & _WORD)
    return key


def _mixed(z: int) -> int:
    z = (z ^ z >> 30) * _FIRST & _WORD
    z = (z ^ z >> 27) * _SECOND & _WORD
    return z ^ z >> 31


def words(key: int, start: int, count: int) -> Tensor:
    """Words `start` to `start + count` of a stream, int64 `[count]` (the top bit is the sign)."""
    counter = torch.arange(start + 1, start + count + 1, device="cpu")
    z = counter * _signed(_GAMMA) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signs(key: int, count: int) -> Tensor:
    """+-1, int64 `[count]`."""
    return 1 + 2 * (words(key, 0, count) >> 63)


def normals(key: int, start: int, count: int) -> Tensor:
    """Normal numbers times `ONE`, rounded, int64 `[count]`."""
    return _quantiles()[_shifted(words(key, start, count), 52)]


def permutation(key: int, count: int) -> Tensor:
    """The order of `count` words, int64 `[count]`; of equal ones the first is first."""
    return words(key, 0, count).argsort(stable=True)


@lru_cache(maxsize=1)
def _quantiles() -> Tensor:
    inverse = NormalDist().inv_cdf
    values = [round(inverse((i + 0.5) / ONE) * ONE) for i in range(ONE)]
    return torch.tensor(values, device="cpu")
