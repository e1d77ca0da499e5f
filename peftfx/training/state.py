"""The controllers' state as one safetensors file: tensors as such, everything else as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..rewriter.errors import ArtifactError


def _leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, item in state.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, (*path, key))  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield (*path, key), item


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """Nested tensors and numbers as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    others: list[Any] = []
    for path, item in _leaves(state):
        if isinstance(item, Tensor):
            tensors[json.dumps(path)] = item.detach().cpu().contiguous().clone()
        else:
            others.append([path, item])
    return safetensors.torch.save(tensors, {"others": json.dumps(others)})


def read_state(path: Path) -> dict[str, Any]:
    """Reads back what `state_bytes` made.

    Raises:
        ArtifactError: the file is damaged.
    """
    state: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = [(json.loads(n), file.get_tensor(n)) for n in file.keys()]  # noqa: SIM118
            found += json.loads((file.metadata() or {})["others"])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}.") from error
    for keys, item in found:
        inner = state
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = item
    return state
