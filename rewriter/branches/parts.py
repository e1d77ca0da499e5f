"""What branches are in other libraries' files: changes at stored tensors, and nothing of programs.

Tensors are those of whole weights: the features of fused ones lie in one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

PARTS: dict[str, type[Part]] = {}
"""Kind -> class; filled by subclassing."""


@dataclass(frozen=True)
class Part:
    """A change at one stored tensor.

    Attributes:
        target: the original name of a parameter; '' where the kind says which.
    """

    kind: ClassVar[str] = ""

    target: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__name__.lower()
        PARTS[cls.kind] = cls


@dataclass(frozen=True)
class LowRank(Part):
    """`W + scale b a`, or with a magnitude `diag(m / ||W + scale b a||_row) (W + scale b a)`.

    Attributes:
        a: `[rank, in]`, or of a stack of matrices (groups, experts) `[count, rank, in]`.
        b: `[out, rank]`, or `[count, out, rank]`.
        magnitude: `[count * out]`, or None.
        lookup: of the rows that ids look up, not of the product with the same table.
        dropout: probability on what `a` reads, in training.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    lookup: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Invoked(Part):
    """`LowRank`, for the tokens from the last place on where some ids stand one behind the other.

    Attributes:
        ids: int64 `[length]`.
    """

    a: Tensor
    b: Tensor
    scale: float
    ids: Tensor
    dropout: float = 0.0


@dataclass(frozen=True)
class Change(Part):
    """`W + delta`, with delta `[count * out, in]`: a form that no method here has."""

    delta: Tensor
    method: str = ""


@dataclass(frozen=True)
class Scaling(Part):
    """The inputs or the outputs (bias included) of a weight's calls times a vector.

    Attributes:
        vector: `[in]` or `[out]`.
        side: `in` or `out`.
    """

    vector: Tensor
    side: str


@dataclass(frozen=True)
class Trained(Part):
    """A stored tensor's own values, of its shape."""

    values: Tensor


@dataclass(frozen=True)
class Rows(Part):
    """Rows of a table `[size, width]` that take the place of its own.

    Attributes:
        ids: int64 `[count]`.
        values: `[count, width]`.
    """

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Prompt(Part):
    """Vectors `[length, width]` in front of the embedded tokens."""

    values: Tensor


@dataclass(frozen=True)
class Prefix(Part):
    """Rows in front of the keys and values of an attention, `[length, kv_heads, width]`.

    Attributes:
        layer: ordinal of the attention, in graph order.
        shifted: the tokens' positions count from behind the rows.
        decoder: of an encoder-decoder, whose encoder has none.
    """

    key: Tensor
    value: Tensor
    layer: int
    shifted: bool = True
    decoder: bool = False
