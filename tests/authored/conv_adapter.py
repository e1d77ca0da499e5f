"""Conv-Adapter: a bottleneck of convolutions, parallel to a convolution.

Chen et al., CVPRW 2024, arXiv:2208.07463 (eq. 2, "convolution parallel"):

    y = conv(x) + s * P(relu(D(x)))

D is a convolution of the adapted one's kernel, stride, padding and dilation to `width` channels in
`width` groups, P one of kernel 1, s a vector over the output channels. P starts at zero, s at 4.
Does not fold: it is not linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftfx.authors import Axes, ConvSite, Delta, Editor, Method


class ConvAdapterBranch(Delta):
    """`down [width, in / width * kernel]`, `up [out, width]`, `s [out]`."""

    not_foldable = "its activation function is not linear"
    axes: ClassVar[Axes] = {"down": ("width", "patch"), "up": ("out", "width"), "s": ("out",)}

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.s = nn.Parameter(up.new_full((len(up),), 4.0))

    def branch(self, x: Tensor) -> Tensor:
        depthwise, pointwise = self.shape.in_groups(len(self.down)), self.shape.in_groups(1)
        h = torch.relu(depthwise.narrow(x, self.down))
        return pointwise.widen(h, self.s[:, None] * self.up)


@dataclass(frozen=True, kw_only=True)
class ConvAdapter(Method):
    """Adds the branches at convolutions.

    Attributes:
        reduction: input channels for one channel of the bottleneck; must divide them.
    """

    kinds: ClassVar[tuple[str, ...]] = ("conv",)
    folds: ClassVar[str] = "no: not linear"

    reduction: int = 4
    where: str = "conv"

    def check(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")

    def obstacle(self, site: ConvSite) -> str:
        channels = site.channels[0]
        if channels % self.reduction:
            return f"reduction={self.reduction} does not divide its {channels} input channels. Choose one that does"
        return ""

    def insert(self, edit: Editor, site: ConvSite) -> None:
        width = site.channels[0] // self.reduction
        patch = self.reduction * torch.Size(site.kernel).numel()
        down = torch.empty(width, patch)
        nn.init.kaiming_uniform_(down, a=5**0.5, generator=edit.generator)
        up = torch.zeros(site.channels[1], width)
        like = edit.like(site)
        edit.add(site, ConvAdapterBranch(down.to(like), up.to(like)))
