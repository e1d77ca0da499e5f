"""Hashes that say which tensors an adapter belongs to, independent of files and sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import MetaTensorError
from ..graph.sharded import whole

_PIECE = 1 << 20
"""Bytes that are written at a time."""


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes (row-major, CPU), however it is sharded.

    Raises:
        MetaTensorError: the tensor has no values.
    """
    if tensor.is_meta:
        raise MetaTensorError(
            "a tensor on the meta device has no values to hash. Load the model's weights first: "
            "peftfx.load_weights(program, directory)."
        )
    digest = hashlib.sha256(tensor_prefix(tensor.dtype, tensor.shape))
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_prefix(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """What a tensor's digest starts with; its bytes follow."""
    return f"{str(dtype)[6:]}{list(shape)}".encode()


def tensor_bytes(tensor: Tensor) -> memoryview | bytes:
    """A tensor's bytes (row-major, CPU), without a copy where there is none to make."""
    flat = whole(tensor).detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Writes a tensor's bytes (row-major) to a file."""
    data = tensor_bytes(tensor)
    for start in range(0, len(data), _PIECE):  # whole, they take several times as long
        file.write(data[start : start + _PIECE])


def merkle_root(digests: Mapping[str, str]) -> str:
    """One hash over named tensor digests, in name order."""
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(f"{name}\0{digests[name]}\n".encode())
    return root.hexdigest()
