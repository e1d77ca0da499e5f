"""Branches: modules that a pass inserts, with the semantics that the rewriter needs.

A branch knows its forward, how it folds (or why it cannot), and nothing of graphs. The base
classes are the slots a branch can fill; a method subclasses one and gives the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts.parts import Part
from .row_scaling import scaled_rows
from .shapes import LinearShape, Shape

Axes = Mapping[str, tuple[str | tuple[str, ...], ...]]
"""Name of a tensor -> the names of its axes; `("head", "rank")` names one that is their product."""
Fused = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]


class Branch(nn.Module):
    """Base of all inserted modules.

    Parameters are in float32 at least; what a branch returns has the dtype of its operand. Values
    of the graph that it reads beside its own operand (a gate, a mask, generated weights) are
    keyword arguments of `forward`, under the names that the method gave to the editor.

    Class attributes:
        slot: where it sits at its site.
        not_foldable: why it cannot become a constant; empty if it can.
        single: why a site takes only one branch of this slot; empty for several.
        reads, writes: what the feature axis of its input and of its output is called.
        axes: names of the axes of its parameters and buffers, and of what it reads of fixed shape;
            those called like `reads` or `writes` are cut with the channels there.
    """

    slot: ClassVar[str] = ""
    not_foldable: ClassVar[str] = ""
    single: ClassVar[str] = ""
    reads: ClassVar[str] = ""
    writes: ClassVar[str] = ""
    axes: ClassVar[Axes] = {}

    features: Tensor | None
    """For a part of a fused weight: `[out]` indices into (0, *own features), 0 = untouched."""
    shape: Shape = LinearShape()
    """Of the weight that it stands beside."""
    axis: int = -1
    """The axis of the features in the values that the branch reads and writes."""

    dropout: float = 0.0
    """Probability on the input, in training."""

    constants_read: tuple[str, ...] = ()
    """Names of its `constants`."""

    lowered: Fused | None = None
    """The operator that computes it together with its linear, once it is lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the tensors; what no file holds (indices) keeps its values where others lose them,
        on the meta device: a fold by shards reads them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in self._non_persistent_buffers_set:
            old, new = before[name], self._buffers[name]
            if old is not None and new is not None and new.is_meta:
                self._buffers[name] = old
        return self

    def describe(self) -> str:
        """Options for graph text, such as `rank=8`."""
        return ""

    def settled(self, **decided: Any) -> Self | Branch | None:
        """The branch that takes this one's place once training has decided (see `Bake`).

        Args:
            decided: what the method decided for it: kept ranks, a mask, and the constants that
                take the place of values it read.

        Returns:
            A branch of the same slot that reads none of the decided values, or None to remove it.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to settle: {list(decided)}")

    def part(self) -> Part | None:
        """What it is in other libraries' files; None: what its slot says (`exporters`)."""
        return None

    def bound(self, **reads: Tensor) -> Self:
        """A copy that reads these constants instead of values of the graph, so that it folds."""
        twin = copy.deepcopy(self)
        twin.constants_read = tuple(reads)
        for name, tensor in reads.items():
            twin.register_buffer(f"read_{name}", tensor, persistent=False)
        return twin

    @property
    def constants(self) -> dict[str, Tensor]:
        """What it reads, as far as it is `bound`."""
        return {name: getattr(self, f"read_{name}") for name in self.constants_read}

    @property
    def at_linear(self) -> bool:
        """Whether it stands beside a linear."""
        return isinstance(self.shape, LinearShape)

    def dropped(self, x: Tensor) -> Tensor:
        """`x` with this branch's dropout."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def spread(self, own: Tensor, fill: float) -> Tensor:
        """Puts own features `[count * own, ...]` at their places in the fused weight."""
        if self.features is None:
            return own
        stack = own.unflatten(0, (self.shape.count, -1))
        stack = torch.cat([torch.full_like(stack[:, :1], fill), stack], 1)
        return stack.index_select(1, self.features).flatten(0, 1)

    def spread_last(self, own: Tensor, fill: float) -> Tensor:
        """The same for values `[..., own]`, of a call or one for each of its samples."""
        if self.features is None:
            return own
        rest = torch.full_like(own[..., :1], fill)
        return torch.cat([rest, own], -1).index_select(-1, self.features)

    def apart(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(operands of the call, see `Shape`; what the method reads) of what a forward is given."""
        operands = {n: values[n] for n in self.shape.operands if n in values}
        return operands, {n: v for n, v in values.items() if n not in operands}

    def features_last(self, x: Tensor) -> Tensor:
        """`x` with its features on the last axis."""
        return x if self.axis == -1 else x.movedim(self.axis, -1)

    def features_back(self, y: Tensor) -> Tensor:
        """Undoes `features_last`."""
        return y if self.axis == -1 else y.movedim(-1, self.axis)


class Delta(Branch):
    """`y = base(x) + f(x)` with linear f, so that f folds into the weight, or with `not_foldable`.

    Beside an embedding x are ids, and f is linear in their one-hot vectors.
    """

    slot = "delta"
    reads, writes = "in", "out"

    fuses_reads: ClassVar[bool] = False
    """Whether `forward` computes the linear, too, in less than apart, with all that it reads."""

    def branch(self, x: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`f(x, **reads)`: `[..., in] -> [..., out]`; f is linear in x."""
        raise NotImplementedError

    def delta(self, *_: Any, **reads: Any) -> Tensor:
        """The weight that f adds, `[out, in]`, see `shapes`; the reads are constants."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """`(a [rank, in], b [out, rank], s)` with `delta = s b a` beside a linear, or None if f
        has no such form."""
        return None

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **reads: Tensor
    ) -> Tensor:
        """f(x), or with a weight `linear(x, weight, bias) + f(x)`, fused where it was lowered."""
        factors = self.factors() if weight is not None else None
        if weight is not None and factors is not None and self.lowered is not None:
            return self.lowered(x, weight, bias, *factors)
        y = self.branch(self.features_last(x), **self.constants, **reads)
        y = self.features_back(self.spread_last(y, 0.0))
        return y if weight is None else F.linear(x, weight, bias) + y

    def full_delta(self) -> Tensor:
        """`delta()` placed at this branch's features of a fused weight, `[out, in]`."""
        return self.spread(self.delta(**self.constants), 0.0)


class Scale(Branch):
    """Multiplies a linear's input or output by a vector; folds into columns or rows."""

    def scale(self, *_: Any, **reads: Any) -> Tensor:
        """The vector, `[in]` or `[out]`, one an expert, `[count * in]` or `[count * out]`; with
        reads, one for each sample or token is `[..., in]` or `[..., out]` with the axes of x, of
        size 1 where it is the same for all."""
        raise NotImplementedError

    def full_scale(self, **reads: Tensor) -> Tensor:
        """`scale(**reads)` with ones at the untouched features of a fused weight."""
        s = self.scale(**self.constants, **reads)
        return self.spread(s, 1.0) if s.dim() == 1 else self.spread_last(s, 1.0)

    def forward(self, x: Tensor, **reads: Tensor) -> Tensor:
        """`x [..., in]` or `[..., out]`, scaled."""
        operands, reads = self.apart(reads)
        last, scale = self.features_last(x), self.full_scale(**reads)
        scale = self.shape.along(scale, last, **operands) if scale.dim() == 1 else scale
        scaled = last * scale  # maybe wider, as in `RowScale`
        return self.features_back(scaled.to(x.dtype))


class InputScale(Scale):
    """`y = base(s * x)`."""

    slot = "input_scale"
    reads = writes = "in"


class OutputScale(Scale):
    """`y = s * base(x)`, bias and deltas included."""

    slot = "output_scale"
    reads = writes = "out"


class RowScale(Branch):
    """`y = c * (W x + f(x)) + b`: rescales the rows of a weight and of its own linear part f.

    c may depend on the weight. It acts on the weight itself, below all other branches of the
    linear; f folds with it.
    """

    slot = "row_scale"
    reads = writes = "out"
    single = "the rows of a weight have one magnitude"

    own: Tensor | None
    """For a part of a fused weight: its rows, `[count * own features]`."""

    in_place: bool = False
    """Whether a lowered branch may keep its result, which nothing changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", None, persistent=False)

    def branch(self, x: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`f(x, **reads)`: `[..., in] -> [..., out]`; f is linear in x."""
        raise NotImplementedError

    def delta(self, *_: Any, **reads: Any) -> Tensor:
        """The weight that f adds, as of a `Delta`."""
        raise NotImplementedError

    def rows(self, weight: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """c for the weight `[out, in]` without f: `[out]`, or with reads `[..., out]` like y."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Of f, as `Delta.factors`."""
        return None

    def full_rows(self, weight: Tensor, **reads: Tensor) -> Tensor:
        """`rows` of the whole stored weight, with ones at untouched features."""
        dense = self.shape.matrix(weight)
        own = dense if self.own is None else dense[self.own]
        rows = self.rows(own, **self.constants, **reads)
        return self.spread(rows, 1.0) if rows.dim() == 1 else self.spread_last(rows, 1.0)

    def full_delta(self) -> Tensor:
        """`delta()` placed at this branch's features of a fused weight, `[out, in]`."""
        return self.spread(self.delta(**self.constants), 0.0)

    def forward(
        self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, **reads: Tensor
    ) -> Tensor:
        """`y` is `linear(x, weight, bias)`; a lowered branch computes it and does not read y. What
        is read goes to both `rows` and `branch`."""
        operands, rest = self.apart(reads)
        c = self.full_rows(weight, **rest)  # maybe wider than y: rounding it moves whole rows
        factors = self.factors() if self.lowered is not None else None
        if self.lowered is not None and factors is not None:
            own = self.lowered(x, weight, None, *factors)
            return scaled_rows(own, c, bias, self.in_place)
        f = self.branch(self.features_last(x), **self.constants, **reads)
        own = self.features_last(y) + self.spread_last(f, 0.0)
        c = self.shape.along(c, own, **operands) if c.dim() == 1 else c
        bias = None if bias is None else self.shape.along(bias, own, **operands)
        scaled = own * c if bias is None else own * c + (1 - c) * bias
        return self.features_back(scaled.to(y.dtype))


class Expression(Branch):
    """`w' = f(w)`: computes a stored tensor, or several, afresh on every forward."""

    slot = "expression"

    def forward(self, *w: Any, **reads: Any) -> Any:
        """f(*w, **reads), of the shape and dtype of w; one for each of several."""
        raise NotImplementedError


class Serial(Branch):
    """`h' = h + f(h)` on a sublayer's output."""

    slot = "serial"
    reads = writes = "width"
    not_foldable = "it is not linear"

    def update(self, h: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """`f(h, **reads)`: `[..., width] -> [..., width]`."""
        raise NotImplementedError

    def transform(self, h: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """What takes the place of h; overridden where that is not `h + f(h)`."""
        return h + self.update(h, **reads)

    def forward(self, h: Tensor, skip: bool = True, **reads: Tensor) -> Tensor:
        """The sublayer's new output, or without `skip` what this branch adds to it."""
        f = self.transform if skip else self.update
        return self.features_back(f(self.features_last(h), **reads))


class Combine(Branch):
    """`h' = h + g(h, f_1(h), ..., f_n(h))`: takes the place of the sum of n branches of a site."""

    slot = "combine"
    not_foldable = "how it weighs its members depends on the input"

    def combine(self, h: Tensor, /, *updates: Any, **reads: Any) -> Tensor:
        """`g`.

        Args:
            h: what the members read (a linear's input, a sublayer's output), `[..., in]`.
            updates: what each of them would add, `[..., out]`.
        """
        raise NotImplementedError

    def forward(self, h: Tensor, *updates: Tensor, **reads: Tensor) -> Tensor:
        values = [self.features_last(v) for v in (h, *updates)]
        return self.features_back(self.combine(*values, **reads))
