"""Where the tensors of a Hugging Face directory lie in those of its model.

transformers stores some models in another form than they run in: Mixtral's experts one by one, in
memory as one stack. What it does to save a model is done to tensors without values; each tensor of
the files is then a view of one of the model's, and its place says which.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..rewriter.storage.safetensors_checkpoint import Checkpoint, Piece


def checkpoint_of(directory: str | Path, model: nn.Module) -> Checkpoint:
    """A directory's tensors, under the names that the model has for them.

    Args:
        directory: see `Checkpoint.read`.
        model: of transformers, or any whose files hold its tensors as they are; the meta device is
            enough.

    Returns:
        As `Checkpoint.read`, also where it is not known how files and model go together: what asks
        for the model's tensors then raises WeightsError.
    """
    files = Checkpoint.read(directory)
    stored = {n: torch.empty_like(t, device="meta") for n, t in model.state_dict().items()}
    if files.entries.keys() <= stored.keys():
        return files
    return files.in_pieces(_pieces(model, stored, files), stored)


class _Places(TorchDispatchMode):
    """Copies are the tensors that they are of: what is moved around stays a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def _pieces(model: nn.Module, stored: dict[str, Tensor], files: Checkpoint) -> dict[str, Piece]:
    """Where the tensors of files lie, {} where transformers does not tell."""
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
        with _Places():
            saved: dict[str, Tensor] = loading.revert_weight_conversion(model, dict(stored))
    except Exception:  # noqa: BLE001 - another version, or no model of transformers: not known
        return {}
    owners = {_storage(tensor): name for name, tensor in stored.items()}
    return {
        file: Piece(owner, tuple(view.shape), view.stride(), int(view.storage_offset()))
        for file, view in saved.items()
        if file in files.entries and (owner := owners.get(_storage(view))) is not None
    }


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata
