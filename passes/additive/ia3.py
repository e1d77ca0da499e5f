"""(IA)3: learnt vectors scale keys, values and the feed-forward block's inner activation.

Liu et al., NeurIPS 2022, arXiv:2205.05638. `k <- l_k k`, `v <- l_v v` on the projections' outputs
(before rotation and caching), and `W_down (l_ff h)` on the input of the down projection, which
for gated blocks is the product. All vectors start at one. Folds exactly: output scales into rows
and bias, input scales into columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rewriter.branches.branch import Axes, InputScale, OutputScale
from ...rewriter.branches.parts import Part, Scaling
from ...rewriter.edits.edit import Editor
from ...rewriter.pipeline.method import Method
from ...rewriter.pipeline.passes import Saved
from ...rewriter.program.sites import WeightSite


class IA3Output(OutputScale):
    """`y = l * base(x)`; parameter `l [out]`."""

    axes: ClassVar[Axes] = {"l": ("out",)}

    def __init__(self, ones: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(ones)

    def scale(self) -> Tensor:
        return self.l


class IA3Input(InputScale):
    """`y = base(l * x)`; parameter `l [in]`."""

    axes: ClassVar[Axes] = {"l": ("in",)}

    def __init__(self, ones: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(ones)

    def scale(self) -> Tensor:
        return self.l


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Scales the selected weights: inputs at `ffn.down`, outputs everywhere else.

    Each expert has vectors of its own.
    """

    folds: ClassVar[str] = "exactly"
    named: ClassVar[tuple[str, ...]] = ("conv", "embedding", "experts")

    where: str = "k|v|ffn.down"

    def insert(self, edit: Editor, site: WeightSite) -> None:
        at_input = site.role == "ffn.down"
        count, out, _ = site.matrices
        size = site.inputs if at_input else count * out
        ones = torch.ones(size).to(edit.like(site))
        edit.scale(site, IA3Input(ones) if at_input else IA3Output(ones))

    def saved_part(self, saved: Saved) -> Part | None:
        side = "in" if saved.slot == IA3Input.slot else "out"
        return Scaling(saved.target, saved.tensors["l"], side)
