"""What a module costs, in the units of budgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Unit = Literal["parameters", "bytes", "flops", "latency"]

_CALLS = 7
"""Timed calls, of which the fastest counts."""


def cost(module: nn.Module, operands: Sequence[Tensor], unit: Unit) -> float:
    """What a module costs.

    Args:
        module: not changed; runs as in evaluation, without gradients.
        operands: of its forward, where a unit runs it; its cost is that for their sizes.
        unit: `parameters` (numbers that train), `bytes` (of all its tensors), `flops` (of the
            matrix products of a forward, a multiplication and an addition being two), or
            `latency` (seconds of a forward on the operands' device, the least of several).
    """
    if unit == "parameters":
        return sum(p.numel() for p in module.parameters())
    if unit == "bytes":
        return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    training = module.training
    module.eval()
    with torch.no_grad():
        figure = _flops(module, operands) if unit == "flops" else _seconds(module, operands)
    module.train(training)
    return figure


def _flops(module: nn.Module, operands: Sequence[Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, where there is one

    with FlopCounterMode(display=False) as counter:
        module(*operands)
    return counter.get_total_flops()


def _seconds(module: nn.Module, operands: Sequence[Tensor]) -> float:
    cuda = any(t.is_cuda for t in operands)
    seconds: list[float] = []
    for _ in range(_CALLS + 1):  # the first warms up
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        module(*operands)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
