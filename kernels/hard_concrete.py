"""Hard-concrete gates: random numbers in [0, 1] that are 0 or 1 with positive probability.

    u ~ U(0, 1),   s = sigmoid((log u - log(1 - u) + alpha) / t),   z = clip(s (r - l) + l, 0, 1)

with l < 0 < 1 < r. Without noise, z = clip(sigmoid(alpha) (r - l) + l, 0, 1). The gate is open with
P(z > 0) = sigmoid(alpha - t log(-l / r)), so the expected number of open gates, which is the L0
norm of what they gate, has a gradient. Louizos et al., ICLR 2018, arXiv:1712.01312.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gate_noise(alpha: Tensor) -> Tensor:
    """u for every gate, drawn from torch's global generator; shape, dtype and device of alpha.

    It keeps a distance from 0 and 1, where its logit is infinite.
    """
    edge = 1e-4  # not of the module: compiled in a checkpointed block it would be an input
    return torch.rand_like(alpha) * (1 - 2 * edge) + edge


def hard_concrete(
    alpha: Tensor,
    u: Tensor | None = None,
    low: float = -1.5,
    high: float = 1.5,
    temperature: float | None = None,
) -> Tensor:
    """z of every gate, differentiable in alpha.

    Args:
        alpha: location of each gate, any shape, float32 or wider (u near 1 needs the digits).
        u: noise of that shape (see `gate_noise`), or None for the deterministic gate.
        low, high: l < 0 and r > 1.
        temperature: t, of random gates; None stands for 1.
    """
    logits = alpha if u is None else torch.logit(u) + alpha
    if u is not None and temperature is not None:
        logits = logits / temperature
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)


def open_probability(
    alpha: Tensor, low: float = -1.5, high: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """P(z > 0) of every random gate, differentiable in alpha."""
    return torch.sigmoid(alpha - temperature * math.log(-low / high))
