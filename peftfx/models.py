"""Models named on the command line: a Hugging Face directory, or `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rewriter.errors import CaptureError


@dataclass(frozen=True)
class Named:
    """A model and example inputs for its capture."""

    model: nn.Module
    example: dict[str, Tensor]


def load_model(name: str, hollow: bool = False) -> Named:
    """Loads what a command line names.

    Args:
        name: a directory with `config.json` and weights (extra `hf`), or `module:function` whose
            function returns `(model, example inputs)`, the inputs as a dict of keyword tensors.
        hollow: build a directory's model on the meta device, without its weights.

    Raises:
        CaptureError: neither, or it cannot be loaded.
    """
    if Path(name).is_dir():
        return _from_directory(Path(name), hollow)
    module, colon, function = name.partition(":")
    if not colon:
        raise CaptureError(
            f"{name!r} is neither a model directory nor module:function. Examples: ./my-model, "
            "my_package.models:tiny."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"{name!r} cannot be imported: {error}.") from error
    result: Any = factory()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise CaptureError(
            f"{name} must return (model, example inputs), not {type(result).__name__}."
        )
    model, example = result
    if isinstance(example, Tensor):
        example = (example,)
    if not isinstance(example, Mapping):
        names = list(_parameters(model))
        example = dict(zip(names, example, strict=False))
    return Named(model, dict(example))


def _parameters(model: nn.Module) -> tuple[str, ...]:
    from .rewriter.inputs.spec import forward_parameters

    return forward_parameters(model.forward)[0]


def _from_directory(path: Path, hollow: bool) -> Named:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise CaptureError(
            "reading a model directory needs transformers: pip install 'peftfx[hf]'."
        ) from error
    if not (path / "config.json").is_file():
        raise CaptureError(f"{path} has no config.json, so it is not a model directory.")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        loader = getattr(transformers, kind, transformers.AutoModel)
        if hollow:
            with torch.device("meta"):
                model = loader._from_config(config, dtype=config.dtype)
        else:
            model = loader.from_pretrained(path)
    except Exception as error:
        raise CaptureError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise CaptureError(
            f"{path}: inputs of {type(model).__name__} cannot be guessed (it has no vocabulary). "
            "Use module:function with example inputs."
        )
    ids = torch.arange(2 * 16).view(2, 16) % vocabulary
    return Named(model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
