"""The two factors of a low-rank branch: how random ones begin, and how fast each learns.

LoRA+ (Hayou et al., ICML 2024, arXiv:2402.12354) gives B a larger learning rate than A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.branches.shapes import EmbeddingShape
from ...rewriter.pipeline.controller import Controller
from ...rewriter.program.sites import EmbeddingSite, WeightSite


def low_rank_parameters(
    site: WeightSite, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`(a [rank, in], b [out, rank])`, or with the number of matrices in front, whose product is
    zero. An embedding's a is zero, so that only rows that are looked up ever change."""
    count, out, size = site.matrices
    a, b = torch.empty(count * rank, size), torch.zeros(count * out, rank)
    if isinstance(site, EmbeddingSite):
        nn.init.zeros_(a), nn.init.normal_(b, generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    if count == 1:
        return a, b
    return a.unflatten(0, (count, rank)), b.unflatten(0, (count, out))


class FactorController(Controller, whole=False):
    """What multiplies outputs (`b`, and magnitudes `m`) learns `lr_ratio` times as fast as `a`."""

    def group(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        method: Any = self.method
        branch: Any = self.program.module.get_submodule(name.rpartition(".")[0])
        fast = parameter is branch.b or parameter is getattr(branch, "m", None)
        usual = super().group(name, parameter)
        if not fast or isinstance(branch.shape, EmbeddingShape):
            return usual
        return {**usual, "lr_scale": method.lr_ratio}
