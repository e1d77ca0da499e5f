"""Norm tuning: train the normalisations' scales and biases and nothing else.

Zhao et al., ICLR 2024, arXiv:2312.11420 (PEFT's LN_TUNING). A norm without learnt parameters has
nothing to train. Nothing to fold: they are weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .train import Train


@dataclass(frozen=True, kw_only=True)
class NormTuning(Train):
    """Makes scales and biases of normalisations trainable.

    Attributes:
        bias: the biases, too.
    """

    kinds: ClassVar[tuple[str, ...]] = ("norm",)

    where: str = "norm"
