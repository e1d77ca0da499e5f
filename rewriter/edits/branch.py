"""Branches: modules that a pass inserts, with the semantics that the rewriter needs.

A branch knows its forward, how it folds (or why it cannot), and nothing of graphs. The base
classes are the slots a branch can fill; a method subclasses one and gives the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Fused = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]


class Branch(nn.Module):
    """Base of all inserted modules.

    Class attributes:
        slot: where it sits at its site.
        not_foldable: why it cannot become a constant; empty if it can.
    """

    slot: ClassVar[str] = ""
    not_foldable: ClassVar[str] = ""

    features: Tensor | None
    """For a part of a fused weight: `[out]` indices into (0, *own features), 0 = untouched."""

    axis: int = -1
    """The axis of the features in the values that the branch reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", None, persistent=False)

    def describe(self) -> str:
        """Options for graph text, such as `rank=8`."""
        return ""

    def features_last(self, x: Tensor) -> Tensor:
        """`x` with its features on the last axis."""
        return x if self.axis == -1 else x.movedim(self.axis, -1)

    def features_back(self, y: Tensor) -> Tensor:
        """Undoes `features_last`."""
        return y if self.axis == -1 else y.movedim(-1, self.axis)


class Delta(Branch):
    """`y = base(x) + f(x)` with linear f, so that f folds into the weight."""

    slot = "delta"

    def __init__(self) -> None:
        super().__init__()
        self.lowered: Fused | None = None

    def branch(self, x: Tensor) -> Tensor:
        """`f(x)`: `[..., in] -> [..., out]`."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The weight that f adds, `[out, in]`."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """`(a [rank, in], b [out, rank], s)` with `delta = s b a`, or None if f has no such form
        (or is random in training), in which case it is not lowered to a fused kernel."""
        return None

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        factors = self.factors() if weight is not None else None
        if weight is not None and factors is not None and self.lowered is not None:
            return self.lowered(x, weight, bias, *factors)
        y = self.branch(self.features_last(x))
        if self.features is not None:
            y = torch.cat([torch.zeros_like(y[..., :1]), y], -1).index_select(-1, self.features)
        return self.features_back(y)

    def full_delta(self) -> Tensor:
        """`delta()` placed at this branch's features of a fused weight, `[out, in]`."""
        d = self.delta()
        if self.features is not None:
            d = torch.cat([torch.zeros_like(d[:1]), d]).index_select(0, self.features)
        return d


class Scale(Branch):
    """Multiplies a linear's input or output by a vector; folds into columns or rows."""

    def scale(self) -> Tensor:
        """The vector, `[in]` or `[out]`."""
        raise NotImplementedError

    def full_scale(self) -> Tensor:
        """`scale()` with ones at the untouched features of a fused weight."""
        s = self.scale()
        if self.features is not None:
            s = torch.cat([torch.ones_like(s[:1]), s]).index_select(0, self.features)
        return s

    def forward(self, x: Tensor) -> Tensor:
        return self.features_back(self.features_last(x) * self.full_scale())


class InputScale(Scale):
    """`y = base(s * x)`."""

    slot = "input_scale"


class OutputScale(Scale):
    """`y = s * base(x)`, bias and deltas included."""

    slot = "output_scale"


class Serial(Branch):
    """`h' = f(h)` on a sublayer's output, with its own skip connection inside."""

    slot = "serial"
    not_foldable = "it is not linear"

    def transform(self, h: Tensor) -> Tensor:
        """`f(h)`: `[..., width] -> [..., width]`."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        return self.features_back(self.transform(self.features_last(h)))


class KeyValue(Branch):
    """Rows prepended to the keys and values of an attention."""

    slot = "key_value"
    not_foldable = "extra keys and values take softmax mass, which no weight can express"

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def rows(self) -> tuple[Tensor, Tensor]:
        """(keys, values), each `[length, kv_heads, width]`."""
        raise NotImplementedError

    def forward(self, key: Tensor, value: Tensor, transposed: bool = False) -> tuple[Any, ...]:
        """Prepends the rows.

        Args:
            key: `[batch, heads, tokens, dim]`, or `[batch, heads, dim, tokens]` if `transposed`;
                the first two axes may be merged into one.
            value: `[batch, heads, tokens, dim]`, or merged.
        """
        k, v = self.rows()
        return self._join(k, key, transposed), self._join(v, value, False)

    def _join(self, rows: Tensor, x: Tensor, transposed: bool) -> Tensor:
        rows = rows.permute(1, 2, 0) if transposed else rows.transpose(0, 1)
        if x.dim() == 4:
            rows = rows.repeat_interleave(x.shape[1] // rows.shape[0], dim=0)
            rows = rows.unsqueeze(0).expand(x.shape[0], -1, -1, -1)
        else:
            rows = rows.repeat(x.shape[0] // rows.shape[0], 1, 1)
        return torch.cat([rows.to(x.dtype), x], dim=-1 if transposed else -2)


class Tokens(Branch):
    """Vectors that take the place of `length` tokens prepended to the input."""

    slot = "tokens"
    not_foldable = "prompt tokens are inputs of the network, not weights"

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def rows(self) -> Tensor:
        """The vectors, `[length, width]`."""
        raise NotImplementedError

    def forward(self, embedded: Tensor) -> Tensor:
        """Overwrites the first `length` positions of `embedded [batch, tokens, width]`."""
        rows = self.rows().to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        return torch.cat([rows, embedded[:, self.length :]], dim=1)
