"""Hashes that say which tensors an adapter belongs to, independent of files and sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import MetaTensorError


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes (row-major, CPU).

    Raises:
        MetaTensorError: the tensor has no values.
    """
    if tensor.is_meta:
        raise MetaTensorError("a tensor on the meta device has no values to hash; load weights.")
    digest = hashlib.sha256(f"{str(tensor.dtype)[6:]}{list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def merkle_root(digests: Mapping[str, str]) -> str:
    """One hash over named tensor digests, in name order."""
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(f"{name}\0{digests[name]}\n".encode())
    return root.hexdigest()
