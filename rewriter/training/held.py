"""Entries of parameters that a step of an optimizer shall leave alone.

A gradient of zero does not: weight decay pulls at the entry, and moments of earlier steps move it
on while they fade. So entries and their state are put back behind the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Held:
    """What some entries are before a step, with the optimizer's numbers of them."""

    @torch.no_grad()
    def __init__(
        self, optimizer: torch.optim.Optimizer | None, masks: Sequence[tuple[nn.Parameter, Tensor]]
    ) -> None:
        """
        Args:
            masks: parameters with which of their entries are held, bool, of a shape that spreads
                to theirs.
        """
        self.state: Any = {} if optimizer is None else optimizer.state
        self.before = [
            (parameter, mask, {n: t.clone() for n, t in self._tensors(parameter).items()})
            for parameter, mask in masks
        ]

    def _tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The parameter, and what the optimizer has of its shape."""
        state: dict[str, Any] = self.state.get(parameter, {})
        own = {n: t for n, t in state.items() if isinstance(t, Tensor)}
        return {"": parameter.data, **{n: t for n, t in own.items() if t.shape == parameter.shape}}

    @torch.no_grad()
    def put_back(self) -> None:
        """Behind the step; state that began with it is zero where an entry is held."""
        for parameter, mask, before in self.before:
            for name, tensor in self._tensors(parameter).items():
                old = before.get(name)
                tensor.copy_(torch.where(mask, 0.0 if old is None else old, tensor))
