"""Sites: the places that passes rewrite, keyed by stable ids and found by dataflow alone.

A site names its graph nodes by node name, so that a fork of the graph keeps the same sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A place in a program that a pass can rewrite.

    Attributes:
        id: stable name: a weight's name, or `stream.layer.kind`.
        kind: `linear`, `experts`, `attention`, `feedforward`, `mixer`, `sublayer`, `embedding`,
            `conv` or `norm`.
        role: what it does (`q`, `k`, `v`, `o`, `ffn.up`, `attn`, `token`, ...).
        layer: ordinal of its block in its stream, None outside of blocks.
        stream: name of the chain of residual sublayers that it belongs to, or ''.
        nodes: names of the graph nodes that compute it.
    """

    id: str
    kind: str
    role: str
    layer: int | None
    stream: str
    nodes: tuple[str, ...]

    @property
    def module(self) -> str:
        """The dotted module name that name selectors match."""
        return self.id

    @property
    def tags(self) -> frozenset[str]:
        """The bare words of the selector grammar that hit this site."""
        parts = self.role.split(".")
        return frozenset({self.kind, *(".".join(parts[: i + 1]) for i in range(len(parts)))})

    @property
    def obstacle(self) -> str:
        """Why no branch can be put at the calls; '' if one can."""
        return ""

    def describe(self) -> str:
        """A few words for the table of sites."""
        return ""


@dataclass(frozen=True)
class WeightSite(Site):
    """Calls that multiply by a stored weight, a stack of matrices (see `branches/shapes.py`).

    Attributes:
        weight: the parameter's original name.
        bias: the bias parameter's name, or None.
        features: None, or the output features of a fused weight that play the role.
        tied: other names of the same weight tensor, and other kinds of use.
        left: the calls are `W @ x`, with the features on the last axis but one.
    """

    weight: str = ""
    bias: str | None = None
    features: tuple[int, ...] | None = None
    tied: tuple[str, ...] = ()
    left: bool = False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(count, out, in): how many matrices there are, and the size of each."""
        raise NotImplementedError

    @property
    def inputs(self) -> int:
        """How many numbers scale what a call reads."""
        count, _, size = self.matrices
        return count * size


@dataclass(frozen=True)
class LinearSite(WeightSite):
    """One weight matrix, or the features of a fused one that play one role.

    Attributes:
        in_features, out_features: of this site (`out_features` counts `features` only).
        in_out: the weight is stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
        cross: a projection of a cross-attention.
        sliced: the calls multiply by a slice of the stored weight.
        fixed: what keeps the calls from being those of a linear, '' if nothing does.
    """

    in_features: int = 0
    out_features: int = 0
    in_out: bool = False
    cross: bool = False
    sliced: bool = False
    fixed: str = ""

    @property
    def matrices(self) -> tuple[int, int, int]:
        return 1, self.out_features, self.in_features

    @property
    def obstacle(self) -> str:
        if self.sliced:
            return f"its calls multiply by a slice of {self.weight}, not by all of it"
        return f"no branch can be put there: {self.fixed}" if self.fixed else ""

    @property
    def module(self) -> str:
        name = self.id.partition(":")[0]
        return name.rpartition(".")[0] or name

    @property
    def tags(self) -> frozenset[str]:
        extra = {"cross" if self.cross else "self"} if self.role in ("q", "k", "v", "o") else set()
        group = {"attn"} if extra else set[str]()
        return super().tags | extra | group

    def describe(self) -> str:
        parts = [f"{self.in_features} -> {self.out_features}"]
        if self.features is not None:
            parts.append(f"features {_ranges(self.features)}")
        if self.tied:
            parts.append(f"tied to {', '.join(self.tied)}")
        if len(self.nodes) > 1:
            parts.append(f"{len(self.nodes)} calls")
        if self.obstacle:
            parts.append(self.obstacle)
        return "; ".join(parts)


@dataclass(frozen=True)
class ExpertsSite(WeightSite):
    """A stack of matrices, one an expert, or the features of a fused one that play one role.

    Attributes:
        experts, in_features, out_features: sizes (`out_features` counts `features` only).
        in_out: the weight is stored `[experts, in, out]` instead of `[experts, out, in]`.
        place: the axis that the experts have there instead of the first.
    """

    experts: int = 0
    in_features: int = 0
    out_features: int = 0
    in_out: bool = False
    place: int = 0

    @property
    def axes(self) -> tuple[int, int]:
        """The axes of outputs and inputs in the stored tensor."""
        first, second = (k for k in range(3) if k != self.place)
        return (second, first) if self.in_out else (first, second)

    @property
    def module(self) -> str:
        return self.id.partition(":")[0]

    @property
    def matrices(self) -> tuple[int, int, int]:
        return self.experts, self.out_features, self.in_features

    def describe(self) -> str:
        parts = [f"{self.experts} of {self.in_features} -> {self.out_features}"]
        if self.features is not None:
            parts.append(f"features {_ranges(self.features)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class AttentionSite(Site):
    """One attention: where queries meet keys and values.

    Attributes:
        q, k, v, o: ids of the projections' linear sites.
        heads, kv_heads, head_dim: `kv_heads` is smaller than `heads` for grouped queries.
        cross: queries and keys come from different streams.
        causal: no query sees a later key, by the operator or by an explicit mask.
        fused: one scaled-dot-product node (else matmul, softmax, matmul).
        repeated: keys and values arrive repeated for grouped queries.
        parted: each of their heads is repeated for itself, some maybe for more queries than others
            (`kv_heads` is `heads` then: so many arrive).
    """

    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    cross: bool = False
    causal: bool = False
    fused: bool = True
    repeated: bool = False
    parted: bool = False

    @property
    def tags(self) -> frozenset[str]:
        return super().tags | {"cross" if self.cross else "self"}

    def describe(self) -> str:
        kind = "cross" if self.cross else "self"
        heads = f"{self.heads} heads" if self.heads == self.kv_heads else (
            f"{self.heads} heads, {self.kv_heads} key/value heads"
        )  # fmt: skip
        return f"{kind}, {heads} of {self.head_dim}"


@dataclass(frozen=True)
class FeedForwardSite(Site):
    """A feed-forward block: `down(act(gate(x)) * up(x))` or `down(act(up(x)))`.

    Attributes:
        up, gate, down: ids of the linear sites, or of the experts' sites.
        router: id of the linear site that chooses the experts.
        experts: how many there are, 0 for a dense block.
    """

    up: str = ""
    gate: str | None = None
    down: str = ""
    activation: str = ""
    router: str | None = None
    experts: int = 0

    def describe(self) -> str:
        text = f"{self.activation}, gated" if self.gate else self.activation
        return f"{self.experts} experts, {text}" if self.experts else text


@dataclass(frozen=True)
class MixerSite(Site):
    """A token mixer that is no attention (state space, linear attention, gated convolution).

    Attributes:
        inputs, outputs: ids of the linear sites that read and write the stream.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SublayerSite(Site):
    """A residual sublayer; `nodes[0]` is its output before the residual add, `nodes[1]` the add.

    Attributes:
        width: size of the channel axis, the last one (the second one for role `conv`).
        parallel: another sublayer is added to the same residual.
        cross: a cross-attention.
    """

    width: int = 0
    parallel: bool = False
    cross: bool = False

    @property
    def tags(self) -> frozenset[str]:
        side = {"cross" if self.cross else "self"} if self.role == "attn" else set[str]()
        return super().tags | side

    def describe(self) -> str:
        return f"width {self.width}" + (", parallel" if self.parallel else "")


@dataclass(frozen=True)
class EmbeddingSite(WeightSite):
    """A table lookup; role `token`, `position`, `type` or `relative` (biases of attention).

    The weight is stored `[size, width]`.
    """

    size: int = 0
    width: int = 0

    @property
    def module(self) -> str:
        return self.weight.rpartition(".")[0] or self.weight

    @property
    def tags(self) -> frozenset[str]:
        return super().tags | {f"embedding.{self.role}"}

    @property
    def matrices(self) -> tuple[int, int, int]:
        return 1, self.width, self.size

    def describe(self) -> str:
        return f"{self.size} x {self.width}" + (f"; tied to {self.tied[0]}" if self.tied else "")


@dataclass(frozen=True)
class ConvSite(WeightSite):
    """A convolution; role `conv`, `conv.depthwise` or `conv.patch` (patches that do not overlap).

    Attributes:
        channels: (in, out).
        kernel, stride: one number a spatial axis.
        transposed: the weight is stored `[in, out / groups, *kernel]` instead of
            `[out, in / groups, *kernel]`.
    """

    channels: tuple[int, int] = (0, 0)
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def module(self) -> str:
        return self.weight.rpartition(".")[0] or self.weight

    @property
    def matrices(self) -> tuple[int, int, int]:
        patch = self.channels[0] // self.groups * math.prod(self.kernel)
        return self.groups, self.channels[1] // self.groups, patch

    @property
    def inputs(self) -> int:
        return self.channels[0]

    def describe(self) -> str:
        size = "x".join(str(k) for k in self.kernel)
        kind = "transposed, " if self.transposed else ""
        text = f"{kind}{self.channels[0]} -> {self.channels[1]}, kernel {size}"
        return text + (f", {self.groups} groups" if self.groups > 1 else "")


@dataclass(frozen=True)
class NormSite(Site):
    """A normalisation with learnt scale (`weight`) and maybe `bias`; `sublayer` is the kind of the
    one that it begins or ends (`attn`, `cross`, `ffn`, ...), '' if none."""

    weight: str = ""
    bias: str | None = None
    sublayer: str = ""

    @property
    def module(self) -> str:
        return self.weight.rpartition(".")[0] or self.weight


def _ranges(features: tuple[int, ...]) -> str:
    """`0-7, 24-31` for a set of feature indices."""
    runs: list[list[int]] = []
    for index in features:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(f"{a}-{b}" for a, b in runs[:3])
    return text + (", ..." if len(runs) > 3 else "")


def listed(sites: Sequence[Site]) -> str:
    """`2 conv sites (0.weight, 1.weight), 1 norm site (2.weight)`: by kind, three of each."""
    parts: list[str] = []
    for kind in dict.fromkeys(s.kind for s in sites):
        ids = [s.id for s in sites if s.kind == kind]
        more = ", ..." if len(ids) > 3 else ""
        parts.append(f"{len(ids)} {kind} site{'s' * (len(ids) > 1)} ({', '.join(ids[:3])}{more})")
    return ", ".join(parts)
