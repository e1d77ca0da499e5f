"""Prompts and prefixes as PEFT's tensors and config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError, NoFormError
from ...rewriter.parts.parts import Part, Prefix, Prompt

Written = tuple[dict[str, Any], dict[str, Tensor]]
"""A config, and tensors by key."""


def prompt(parts: Sequence[Part]) -> Written:
    """The config and the tensor of a prompt.

    Raises:
        NoFormError: it stands where PEFT has none.
    """
    part = next(p for p in parts if isinstance(p, Prompt))
    if part.place != "input":
        raise NoFormError(
            "PEFT's prompts stand in front of the embedded tokens, and this one stands behind the "
            "position embeddings. Write it for AdapterHub."
        )
    length, width = part.values.shape
    config = {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": length, "token_dim": width,
        "num_transformer_submodules": 1,
    }  # fmt: skip
    return config, {"prompt_embeddings": part.values}


def prefix(parts: Sequence[Part]) -> Written:
    """The config and the tensor of prefixes at every attention.

    Raises:
        ArtifactError: PEFT's have other shapes or places, or another count of positions.
    """
    rows = sorted((p for p in parts if isinstance(p, Prefix)), key=lambda p: p.layer)
    shapes = {t.shape for p in rows for t in (p.key, p.value)}
    usual = all(p.place in ("stack", "decoder") and p.gate is None for p in rows)
    if [p.layer for p in rows] != list(range(len(rows))) or len(shapes) > 1 or not usual:
        raise ArtifactError(
            "PEFT's prefixes have rows of one shape at every attention; this one has not."
        )
    if not all(p.shifted for p in rows):
        raise ArtifactError(
            "PEFT feeds prefixes as a cache, so that positions count from behind them, and this "
            "one was trained without. Insert it with prefix_tuning{shift_positions=true}."
        )
    (length, heads, width), *_ = shapes
    pairs = [torch.stack([p.key, p.value], 1) for p in rows]
    decoder = rows[0].place == "decoder"
    if decoder:  # layer l reads pair 2 l modulo the number, which is one to one if that is odd
        spare = [torch.zeros_like(pairs[0])] * (len(pairs) % 2 == 0)
        layers = len(pairs) + len(spare)
        placed = dict(zip((2 * i % layers for i in range(layers)), [*pairs, *spare], strict=True))
        pairs = [placed[i] for i in range(layers)]
    stack = torch.stack(pairs, 1)
    config = {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "num_layers": len(pairs),
        "num_attention_heads": heads, "token_dim": heads * width,
        "num_transformer_submodules": 1 + decoder,
    }  # fmt: skip
    return config, {"prompt_embeddings": stack.reshape(length, -1)}
