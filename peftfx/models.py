"""Models named on the command line: a Hugging Face directory, a GGUF file, or `module:function`."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .exporters.gguf.base import load_gguf
from .exporters.gguf.file import is_gguf
from .rewriter.errors import CaptureError, RewriteError
from .rewriter.files.files import open_regular
from .rewriter.tracing.reads import Layout, layout_of


@dataclass(frozen=True)
class Named:
    """A model and example inputs for its capture."""

    model: nn.Module
    example: dict[str, Tensor]

    def layout(self) -> Layout | None:
        """Of a hollow model, see `layout_of`."""
        known = {n: t for n, t in self.example.items() if n != "attention_mask"}  # read as numbers
        with _runs_hollow(self.model):
            return layout_of(self.model, known)


@contextlib.contextmanager
def _runs_hollow(model: Any) -> Iterator[None]:
    """Experts of transformers by the form that runs without values in every dtype, meanwhile."""
    own = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if own is None or not hasattr(model, "set_experts_implementation"):
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(own)


def load_model(name: str, hollow: bool = False) -> Named:
    """Loads what a command line names.

    Args:
        name: a directory with `config.json` and weights (extra `hf`), a GGUF file (extras `hf` and
            `gguf`), which is dequantised, or `module:function` whose function returns
            `(model, example inputs)`, the inputs as a dict of keyword tensors.
        hollow: build a directory's model on the meta device, without its weights.

    Raises:
        CaptureError: neither, or it cannot be loaded.
    """
    if Path(name).is_dir():
        return _from_directory(Path(name), hollow)
    if is_gguf_model(name):
        return _named(load_gguf(name, hollow), name)
    module, colon, function = name.partition(":")
    if not colon:
        raise CaptureError(
            f"{name!r} is neither a model directory nor module:function nor a GGUF file. Examples: "
            "./my-model, my_package.models:tiny, model.gguf."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"{name!r} cannot be imported: {error}.") from error
    try:
        result: Any = factory()
    except RewriteError:
        raise
    except Exception as error:
        raise CaptureError(f"{name} raised {type(error).__name__}: {error}") from error
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


def is_gguf_model(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file."""
    path = Path(name)
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return is_gguf(file.read(4))


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
    return _named(model, path)


def _named(model: Any, where: str | Path) -> Named:
    """A model of transformers with ids as its example."""
    vocabulary = getattr(model.config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise CaptureError(
            f"{where}: inputs of {type(model).__name__} cannot be guessed (it has no vocabulary). "
            "Use module:function with example inputs."
        )
    ids = torch.arange(2 * 16).view(2, 16) % vocabulary
    return Named(model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
