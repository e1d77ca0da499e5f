"""Two forwards of one batch that draw other random numbers, and a loss that makes them agree."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import PassError
from ..pipeline.controller import Forward


def run_again(forward: Forward, batch: Any, names: Collection[str], adapter: str) -> Any:
    """The outputs of one more forward.

    Args:
        forward: runs the program.
        batch: a mapping; what is no input is left out.
        names: of the inputs.
        adapter: for messages.

    Raises:
        PassError: there is no batch.
    """
    if not isinstance(batch, Mapping):
        raise PassError(
            f"{adapter}: its consistency loss runs the program on the batch once more. Give both: "
            "controllers.loss(outputs, batch, program), or choose consistency=0."
        )
    inputs: dict[Any, Any] = {n: t for n, t in batch.items() if n in names}  # pyright: ignore
    return forward(**inputs)


def consistency(outputs: Any, again: Any, batch: Mapping[Any, Any], adapter: str) -> Tensor:
    """`(KL(sg(q) | p) + KL(sg(p) | q)) / 2` of the predictions p and q of two forwards.

    Args:
        outputs, again: of the two; the predictions are the softmax over the last axis of the
            output `logits`, or of the first one with rows of numbers.
        batch: where its `labels` have one place for each row, rows with -100 are left out; else,
            where `attention_mask` does, padding is.

    Returns:
        The mean over rows, 0 if there are none.

    Raises:
        PassError: no output has rows.
    """
    whole = [_logits(o, adapter) for o in (outputs, again)]
    rows = _rows(batch, whole[0])
    one, other = (logits.flatten(0, -2)[rows].log_softmax(-1) for logits in whole)
    both = _divergence(other.detach(), one) + _divergence(one.detach(), other)
    return both / 2 / rows.sum().clamp(min=1)


def _divergence(target: Tensor, guess: Tensor) -> Tensor:
    """`KL(target | guess)` of rows of log-probabilities, summed."""
    return F.kl_div(guess, target, reduction="sum", log_target=True)


def _logits(outputs: Any, adapter: str) -> Tensor:
    named = getattr(outputs, "logits", None)
    leaves = [named] if isinstance(named, Tensor) else pytree.tree_leaves(outputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            return leaf.float()
    raise PassError(f"{adapter}: no output has rows of logits. Choose consistency=0.")


def _rows(batch: Mapping[Any, Any], logits: Tensor) -> Tensor:
    """Which rows of the flattened logits count."""
    size, labels, mask = logits.shape[:-1], batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == size and not labels.is_floating_point():
        return labels.flatten() != -100
    if isinstance(mask, Tensor) and mask.shape == size:
        return mask.flatten().bool()
    return torch.ones(size.numel(), dtype=torch.bool, device=logits.device)
