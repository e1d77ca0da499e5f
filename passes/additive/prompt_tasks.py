"""How alike two tasks are by their prompts, see `spot`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.program.sites import EmbeddingSite, LinearSite
from ...rewriter.program.state import State
from ...rewriter.scores.observe import observe
from .prompt_tuning import PromptBranch


def similarity(one: Tensor, other: Tensor, kind: str = "mean") -> float:
    """Of two tasks by their prompts `[tokens, width]`, in [-1, 1]: the cosine of their mean tokens,
    or the mean of the cosines of all pairs of tokens."""
    a, b = one.double(), other.double()
    if kind == "mean":
        return float(F.cosine_similarity(a.mean(0), b.mean(0), 0))
    return float(F.cosine_similarity(a[:, None], b[None], -1).mean())


def activated(
    program: State, site: EmbeddingSite, prompt: Tensor, batch: Mapping[str, Tensor]
) -> Tensor:
    """Which neurons a prompt turns on at the first token of a batch behind it, `[neurons]` of 0
    and 1, float64: the mean over samples, in all feed-forward blocks.

    Raises:
        PassError: the model has no such neurons by token.
    """
    blocks = [s for s in program.sites if isinstance(s, LinearSite)]
    gates = [s for s in blocks if s.role == "ffn.gate"]
    neurons = gates or [s for s in blocks if s.role == "ffn.up"]
    if not neurons:
        raise PassError("the model has no feed-forward neurons. Choose similarity=mean or pairs.")
    edit = Editor(program.fork(), "spot", method="spot")
    edit.prepend_tokens(site, PromptBranch(prompt.to(edit.like(site), copy=True)))
    edit.finish()
    values = {s.id: s for s in neurons}

    def on(value: Tensor) -> Tensor:
        if value.dim() != 3 or len(value) != samples:
            raise PassError(
                "the neurons are not [batch, tokens, width], so those of one token cannot be told. "
                "Choose similarity=mean or pairs."
            )
        return (value[:, len(prompt)] > 0).double().mean(0)

    samples = len(next(iter(batch.values())))
    seen = observe(edit.program, [batch], values, on)
    return torch.cat([seen[name] for name in values])


def prompt_of(tensors: Any, name: str) -> Tensor:
    """The prompt `[length, width]` of a saved adapter."""
    found = [t for n, t in tensors.items() if n.rpartition(".")[2] == "prompt" and t.dim() == 2]
    if len(found) != 1 or len(tensors) != 1:
        raise PassError(
            f"the source {name!r} has {len(tensors)} tensors, not the vectors of one prompt. Give "
            "adapters of prompt_tuning, or of p_tuning after bake."
        )
    return found[0]
