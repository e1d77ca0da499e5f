"""Gradients of stored tensors, as scores of importance need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..program.state import State


def gradients(program: State, data: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The gradients of the loss with respect to stored parameters, summed over batches.

    Args:
        program: not changed; runs in evaluation mode.
        data: batches. A batch is a mapping of inputs for which the program returns a loss (an
            attribute or item `loss`, or a single number), or a pair of such a mapping and a
            function from the outputs to the loss.
        names: of the parameters.

    Raises:
        OptionError: there is no data, or a batch gives no loss.
    """
    fork = program.fork().eval()
    wanted = {name: fork.module.get_parameter(name) for name in names}
    for parameter in fork.module.parameters():
        parameter.requires_grad_(False)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    if not isinstance(data, Iterable):
        raise OptionError(
            "this score needs batches with a loss: run(program, ..., data=batches), where a batch "
            "is a mapping of inputs or a pair (inputs, function from outputs to loss)."
        )
    ran = False
    for batch in data:
        _loss(fork, batch).backward()
        ran = True
    if not ran:
        raise OptionError("this score needs batches with a loss, but data is empty.")
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach() for n, p in wanted.items()
    }


def _loss(program: State, batch: Any) -> Tensor:
    inputs, measure = (
        batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    )
    if not isinstance(inputs, Mapping):
        raise OptionError(
            f"a batch must be a mapping of inputs, or a pair of one and a function from the "
            f"outputs to the loss; this one is a {type(inputs).__name__}."
        )
    output: Any = program(**inputs)
    if measure is not None:
        loss = measure(output)
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OptionError(
            "the program returns no loss for a batch. Capture it with labels, or give pairs "
            "(inputs, function from outputs to loss)."
        )
    return loss
