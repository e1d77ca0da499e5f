"""A small space and a score that needs no training, for tests of the search."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftfx
from peftfx.search import Found, Space, search

SIZES = {"serial": (0, 2, 4, 8), "parallel": (0, 2, 4, 8)}


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def small() -> peftfx.Program:
    """Three residual blocks, captured."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).eval().requires_grad_(False)
    return peftfx.capture(model, (torch.randn(2, 5, 8),))


def space(**options: Any) -> Space:
    """2^3 layers, 4 x 4 sizes."""
    return Space((0, 1, 2), SIZES, **options)


def score(program: peftfx.Program) -> float:
    """Made up, with a front of many trials: more is better, serial adapters more so."""
    text = program.history[-1].text
    size = sum(p.numel() for p in program.trainable_parameters())
    return size**0.5 + 5.0 * ("serial=8" in text) + 2.0 * text.count("2")


def worker(storage: str, trials: int, seconds: float, mark: str = "") -> None:
    """What another process runs; `mark` is a file that is written once a trial runs."""

    def slow(program: peftfx.Program) -> float:
        if mark:
            Path(mark).write_text(program.history[-1].text)
        time.sleep(seconds)
        return score(program)

    search(small(), space(), slow, trials=trials, sampler="random", storage=storage, heartbeat=1)


def command(storage: str, trials: int, seconds: float, mark: str = "") -> list[str]:
    """The command of such a process."""
    call = f"worker({storage!r}, {trials}, {seconds}, {mark!r})"
    return [sys.executable, "-c", f"from tests.search.common import worker; {call}"]


def environment() -> dict[str, str]:
    """Of such a process."""
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}", "PYTHONWARNINGS": "ignore"}


def recipes(found: Found) -> list[str]:
    """Of all trials."""
    return [t.recipe for t in found.trials]


def distinct(items: Sequence[str]) -> bool:
    """Whether none is there twice."""
    return len({*items}) == len(items)
