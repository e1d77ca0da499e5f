"""The controllers' state as one safetensors file: tensors as such, everything else as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from ..rewriter.errors import ArtifactError
from ..rewriter.storage.nested import flatten, nest


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """Nested tensors and numbers as one safetensors file."""
    tensors, rest = flatten(state)
    held = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(held, {"others": json.dumps(rest)})


def read_state(path: Path) -> dict[str, Any]:
    """Reads back what `state_bytes` made.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return nest(tensors, json.loads((file.metadata() or {})["others"]))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}.") from error
