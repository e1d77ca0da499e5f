"""A bottleneck on a sublayer's output as other libraries' files have it, in all its variants.

What it reads and what it skips to may be other values than the output: `Bottleneck` in `parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts.parts import Bottleneck, Part
from .branch import Axes, Serial
from .shapes import linear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swish": F.silu,
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "linear": lambda x: x,
}
"""By the names of transformers, and `leakyrelu`."""

_TENSORS = (
    "down", "up", "down_bias", "up_bias", "factor", "before_weight", "before_bias", "after_weight",
    "after_bias",
)  # fmt: skip
_OPTIONS = ("activation", "scale", "reads", "skips", "inside", "dropout")


class BottleneckBranch(Serial):
    """`r + s (U sigma(D z + b_D) + b_U)`; its tensors are those of the part, or None."""

    not_foldable = "its activation function is not linear"
    axes: ClassVar[Axes] = {
        "down": ("rank", "width"), "down_bias": ("rank",),
        "up": ("width", "rank"), "up_bias": ("width",),
        "before_weight": ("width",), "before_bias": ("width",),
        "after_weight": ("width",), "after_bias": ("width",), "seen": ("...", "width"),
    }  # fmt: skip

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    factor: Tensor | None
    before_weight: Tensor | None
    before_bias: Tensor | None
    after_weight: Tensor | None
    after_bias: Tensor | None

    inner_dropout: float = 0.0
    """Probability on what the activation gives, in training."""
    epsilon: float = 1e-5
    """Of its norms."""

    def __init__(self, part: Bottleneck, like: Tensor) -> None:
        super().__init__()
        for name in _TENSORS:
            tensor = getattr(part, name)
            own = None if tensor is None else nn.Parameter(tensor.to(like, copy=True))
            self.register_parameter(name, own)
        self.options: dict[str, Any] = {n: getattr(part, n) for n in _OPTIONS}
        self.dropout = part.dropout

    def update(self, h: Tensor, gate: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """`gate`: `[batch, 1, 1]`; `seen`: z, of the shape of h."""
        inner = self.units(h if seen is None else self.features_last(seen))
        if self.inner_dropout:
            inner = F.dropout(inner, self.inner_dropout, self.training)
        up = linear(inner, self.up, self.up_bias)
        scale = self.options["scale"] if self.factor is None else self.factor.to(up.dtype)
        up = self.dropped(up * scale)
        return up if gate is None else up * gate

    def units(self, z: Tensor) -> Tensor:
        """What the inner units give for what D reads."""
        if self.before_weight is not None:
            z = self._norm(z, self.before_weight, self.before_bias)
        return ACTIVATIONS[self.options["activation"]](linear(z, self.down, self.down_bias))

    def transform(
        self, h: Tensor, gate: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        stream = self.options["skips"] == "stream" and seen is not None
        skip = self.features_last(seen) if stream and seen is not None else h
        update = self.update(h, gate, seen)
        if self.after_weight is None:
            return skip + update
        if self.options["inside"]:
            return self._norm(skip + update, self.after_weight, self.after_bias)
        return skip + self._norm(update, self.after_weight, self.after_bias)

    def part(self) -> Part | None:
        if self.inner_dropout or self.epsilon != type(self).epsilon:
            return None  # other libraries have a dropout at another place, and one epsilon
        own = {n: p.detach() for n, p in self.named_parameters()}
        return Bottleneck("", **own, **self.options)

    def describe(self) -> str:
        reads = self.options["reads"]
        seen = "" if reads == "output" else f", reads the {reads}"
        return f"bottleneck={len(self.down)}, {self.options['activation']}{seen}"

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, self.epsilon)
