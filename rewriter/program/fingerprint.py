"""Fingerprints of stored tensors: what has to stay as it is, and whether it has.

Programs share frozen storage with the model that they were captured from and with each other, so
`load_state_dict` or an optimizer on that model moves them too. Version counters tell of most
writes for nothing; a checksum of the values also tells of those through `.data` and through
memory that has no counter, and forgives a tensor that was moved or got its old values back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.module import same_view
from ..graph.sharded import is_sharded

_COLUMNS = 1021
"""Words are laid out in rows of so many, of which rows and columns are added up. A prime: no
matrix has rows like that, which could change places unseen."""


@dataclass(frozen=True)
class Print:
    """One tensor as it was.

    Attributes:
        view: where it was, see `same_view`.
        version: its version counter, None where it has none (inference tensors).
        values: checksum of dtype, shape and values; None where reading all is too much (files).
    """

    view: tuple[Any, ...]
    version: int | None
    values: bytes | None


@dataclass(frozen=True)
class Fingerprints:
    """What a program must find unchanged, by name.

    Attributes:
        base: tensors of the captured program; what may train there counts from the first program
            that was derived from it.
        own: the program's own frozen tensors that are not the base's (folded weights).
    """

    base: Mapping[str, Print] = field(default_factory=dict[str, Print])
    own: Mapping[str, Print] = field(default_factory=dict[str, Print])


def checksum(tensor: Tensor) -> bytes:
    """16 bytes that follow from dtype, shape and values, on any device; reads the tensor once.

    Not `torch.hash_tensor`: it xors words, so `-w`, a permuted `w` and any constant look alike.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    raw = flat.view(torch.uint8)
    digest = hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode(), digest_size=16)
    rows = raw.numel() // (8 * _COLUMNS)
    if rows > 1:
        head, raw = raw[: rows * 8 * _COLUMNS], raw[rows * 8 * _COLUMNS :]
        if head.storage_offset() % 8:
            head = head.clone()  # words lie at multiples of their size
        words = head.view(torch.int64).view(rows, _COLUMNS)
        on_cpu = words.device.type == "cpu"
        for axis in (0, 1):  # numpy gives the same numbers in half the time
            sums = words.numpy().sum(axis) if on_cpu else words.sum(axis).cpu().numpy()
            digest.update(sums.data)
    digest.update(raw.cpu().numpy().data)
    return digest.digest()


def hollow(tensor: Tensor) -> bool:
    """Whether there is nothing to compare here: no values, or a rank's own copy of its part."""
    return tensor.is_meta or is_sharded(tensor) or not tensor.numel()


def printed(
    tensors: Mapping[str, Tensor], known: Mapping[str, Print], values: bool
) -> dict[str, Print]:
    prints: dict[str, Print] = {}
    for name, tensor in tensors.items():
        if name in known and (hollow(tensor) or is_at(tensor, known[name])):
            prints[name] = known[name]
        elif not hollow(tensor):
            read = checksum(tensor) if values else None
            prints[name] = Print(same_view(tensor), _version(tensor), read)
    return prints


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def is_at(tensor: Tensor, printed: Print | None) -> bool:
    """Whether a tensor is where its fingerprint was taken."""
    return printed is not None and not hollow(tensor) and same_view(tensor) == printed.view


def differs(tensor: Tensor | None, printed: Print, values: bool) -> bool:
    if tensor is None or hollow(tensor):
        return False
    version = _version(tensor)
    same = is_at(tensor, printed) and version == printed.version
    if printed.values is None:
        return is_at(tensor, printed) and not same
    if same and version is not None and not values:
        return False
    return checksum(tensor) != printed.values
