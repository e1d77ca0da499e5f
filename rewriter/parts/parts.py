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
        gate, gate_bias: see `Bottleneck`.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    lookup: bool = False
    dropout: float = 0.0
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


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
    """Vectors `[length, width]` in front of the embedded tokens.

    Attributes:
        place: see `Editor.prepend_tokens`.
    """

    values: Tensor
    place: str = "input"


@dataclass(frozen=True)
class Prefix(Part):
    """Rows in front of the keys and values of an attention, `[length, kv_heads, width]`.

    Attributes:
        layer: ordinal of the attention among those of its place, in graph order.
        shifted: the tokens' positions count from behind the rows.
        keys_moved: the same, of biases by distance and among keys alone; queries count from 0.
        place: which attentions are counted: `stack` (those of tokens with one another, of a model
            that has no others), `decoder` (the same, of a decoder beside an encoder), `own` (the
            same, of both), `cross`.
        gate, gate_bias: see `Bottleneck`.
    """

    key: Tensor
    value: Tensor
    layer: int
    shifted: bool = True
    place: str = "stack"
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    keys_moved: bool = False


@dataclass(frozen=True)
class Bottleneck(Part):
    """`h <- r + s U sigma(D z + b_D) + b_U` on the output h of a sublayer.

    z, and the skip r, are h itself (`output`), the stream behind the sublayer (`stream`: its sum
    with h, normed in post-norm models), the stream that h is added to (`residual`), or the norm of
    that which the sublayer reads (`input`).

    Attributes:
        target: the weight whose product is the sublayer's last one.
        down, up: `[rank, width]`, `[width, rank]`.
        down_bias, up_bias: `[rank]`, `[width]`.
        activation: sigma, by the name that transformers gives it.
        scale: s, or a learnt one in `factor`, `[1]` or `[width]`.
        reads, skips: what z and r are; r is `output` or `stream`.
        before_weight, before_bias: of a layer norm on z.
        after_weight, after_bias: of a layer norm on the update, or (`inside`) on its sum with r.
        gate, gate_bias: `[1, width]`, `[1]`: the update times a sigmoid of z's product with it,
            the mean over all tokens of the sample.
        dropout: probability on the update, in training.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "relu"
    scale: float = 1.0
    factor: Tensor | None = None
    reads: str = "output"
    skips: str = "output"
    before_weight: Tensor | None = None
    before_bias: Tensor | None = None
    after_weight: Tensor | None = None
    after_bias: Tensor | None = None
    inside: bool = False
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Its inner width."""
        return len(self.down)

    @property
    def width(self) -> int:
        """Of what it changes."""
        return len(self.up)


@dataclass(frozen=True)
class Hypercomplex(Part):
    """A `Bottleneck` on the output alone, whose D and U are transposes of `sum_i A_i (x) B_i`.

    Attributes:
        target, activation, scale, dropout, down_bias, up_bias: as of `Bottleneck`.
        down_rule, up_rule: A of each projection, `[n, n, n]`.
        down_left, up_left: `[n, in / n, rank]`; without right factors B, `[n, in / n, out / n]`.
        down_right, up_right: `[n, rank, out / n]`: `B_i = left_i right_i`.
    """

    reads: ClassVar[str] = "output"
    skips: ClassVar[str] = "output"

    down_rule: Tensor
    up_rule: Tensor
    down_left: Tensor
    up_left: Tensor
    down_bias: Tensor
    up_bias: Tensor
    down_right: Tensor | None = None
    up_right: Tensor | None = None
    activation: str = "gelu"
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Its inner width."""
        return len(self.down_bias)

    @property
    def width(self) -> int:
        """Of what it changes."""
        return len(self.up_bias)


@dataclass(frozen=True)
class Coupling(Part):
    """`x1 <- x1 + F(x2); x2 <- x2 + G(x1)` on the halves of the stream's features where the stream
    begins: behind position embeddings, norms and dropout. F and G are `U sigma(D x + b_D) + b_U`.

    NICE (Dinh et al., 2015, arXiv:1410.8516), as MAD-X has it for languages (Pfeiffer et al., EMNLP
    2020, arXiv:2005.00052).

    Attributes:
        target: the table of tokens whose stream it is.
        first_down, first_down_bias, first_up, first_up_bias: of F, `[rank, width - width // 2]`,
            `[rank]`, `[width // 2, rank]`, `[width // 2]`.
        second_down, second_down_bias, second_up, second_up_bias: of G, the same with the halves
            exchanged.
        activation: sigma, as of `Bottleneck`.
    """

    first_down: Tensor
    first_down_bias: Tensor
    first_up: Tensor
    first_up_bias: Tensor
    second_down: Tensor
    second_down_bias: Tensor
    second_up: Tensor
    second_up_bias: Tensor
    activation: str = "relu"


@dataclass(frozen=True)
class Fusion(Part):
    """Attention over what other adapters would add to the output h of a sublayer.

    Attributes:
        target: as of `Bottleneck`.
        members: names of the adapters, separated by commas.
        query, key, value: `[width, width]`.
        query_bias, key_bias: `[width]`.
        reads: what the query reads, as of `Bottleneck`.
    """

    members: str
    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    reads: str = "output"
