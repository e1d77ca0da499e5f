"""The controllers' state as one safetensors file: tensors as such, everything else as JSON.

Its metadata holds a sha256 over names, tensors and the rest, so that no flipped bit goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..rewriter.errors import ArtifactError, CorruptFileError
from ..rewriter.files.files import parse_json, parse_tensors, read_file
from ..rewriter.files.identity import merkle_root, tensor_digest
from ..rewriter.files.nested import flatten, nest

_REST, _SEAL = "others", "sha256"


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """Nested tensors and numbers as one safetensors file."""
    tensors, rest = flatten(state)
    contiguous = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(rest)
    return safetensors.torch.save(contiguous, {_REST: text, _SEAL: _seal(contiguous, text)})


def read_state(path: Path) -> dict[str, Any]:
    """Reads back what `state_bytes` made; the first format had no sha256.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    data = read_file(path)
    tensors = parse_tensors(data, str(path))
    metadata = _metadata(data, str(path))
    if set(metadata) not in ({_REST}, {_REST, _SEAL}):
        raise CorruptFileError(f"{path} is damaged: its header says {sorted(metadata)}.")
    if metadata.get(_SEAL, "") != (_seal(tensors, metadata[_REST]) if _SEAL in metadata else ""):
        raise CorruptFileError(f"{path} is damaged: it was altered (sha256 differs).")
    rest = parse_json(metadata[_REST].encode(), f"{path}, {_REST}")
    try:
        return nest(tensors, rest)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged: {error}.") from error


def _metadata(data: bytes, where: str) -> dict[str, str]:
    (size,) = struct.unpack("<Q", data[:8])
    header = parse_json(data[8 : 8 + size].rstrip(b" "), where)
    return dict(header.get("__metadata__") or {})


def _seal(tensors: Mapping[str, Tensor], rest: str) -> str:
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(f"{merkle_root(digests)}\n{rest}".encode()).hexdigest()
