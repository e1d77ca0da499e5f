"""Hidden states by sample and token: what gates, routers and pooled prompts average over.

Models lay them out differently (`[batch, tokens, width]`, tokens first, both in one axis), some
tokens are padding, and where attention is causal no token may learn of a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...branches.samples import Samples
from ...graph.aten import (
    ATEN,
    CASTS,
    VIEWS,
    ancestors,
    inputs,
    is_op,
    overloads,
    shape,
    strip,
    users,
    value,
    written,
)
from ...program.sites import AttentionSite, LinearSite, MixerSite, Site
from ...program.state import State
from ..calls.call import Value, latest
from ..calls.samples import ShownAxes
from ..calls.values import input_of
from ..prompts.packed_rows import packed_by
from .padding import valid_of

_TOKEN_NORMS = overloads("layer_norm", "rms_norm")


Reach = Literal["all", "past", "first"]


@dataclass(frozen=True)
class Axes:
    """Where samples and their tokens lie in hidden states; the width is the last axis."""

    batch: int
    tokens: tuple[int, ...]

    def mean(self, x: Tensor, valid: Tensor | None = None, reach: Reach = "all") -> Tensor:
        """The mean of `x` over the real tokens of each sample, computed in at least float32.

        Args:
            x: values by token, laid out like the hidden states, with any last axis.
            valid: bool `[batch, tokens]`, True for real tokens.
            reach: over `all` tokens, over those up to and with each (`past`, the result keeps
                its token axis), or of the `first` real one alone.

        Returns:
            Like x, with token axes of size 1 unless `past`.
        """
        if not self.tokens:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        one = torch.ones_like(x[..., :1], dtype=wide)
        weight = one if valid is None else one * self._like(x, valid)
        axis = self.tokens[0]
        if reach == "past":
            running = (x * weight).cumsum(axis) / weight.cumsum(axis).clamp(min=1)
            return running.to(x.dtype)
        if reach == "first":
            weight = weight * (weight.cumsum(axis) == 1)
        total = weight.sum(self.tokens, keepdim=True).clamp(min=1)
        return ((x * weight).sum(self.tokens, keepdim=True) / total).to(x.dtype)

    def _like(self, x: Tensor, valid: Tensor) -> Tensor:
        mask = valid if self.batch < self.tokens[0] else valid.mT
        for axis in range(x.dim()):
            if axis not in (self.batch, self.tokens[0]):
                mask = mask.unsqueeze(axis)
        return mask


@dataclass(frozen=True)
class Hidden:
    """Hidden states as a method sees them.

    Attributes:
        value, width: the states, and the size of their last axis.
        valid: which tokens are real, bool `[batch, tokens]`; None if all are.
        axes: where samples and tokens lie in them.
        causal: no token may learn of a later one.
        rows: where samples lie in what the site reads, where that is laid out otherwise.
    """

    value: Value
    width: int
    valid: Value | None
    axes: Axes
    causal: bool
    rows: Samples | None = None

    @property
    def reach(self) -> Reach:
        """What a mean for each token may be over: with causal attention, its past."""
        return "past" if self.causal else "all"


def hidden_of(
    program: State, axes: ShownAxes, site: Site, nodes: Mapping[str, Node], given: Value | None
) -> Hidden | str:
    """The hidden states that a site reads (or `given`), or why their tokens cannot be told."""
    at = site
    if isinstance(site, AttentionSite):
        at = next((s for s in program.sites if s.id == site.q), site)
    if isinstance(at, LinearSite) and len(at.nodes) > 1:
        return f"{at.weight} multiplies hidden states at {len(at.nodes)} places"
    source = input_of(at, nodes) if given is None else given
    width = (shape(source) or (0,))[-1]
    wanted = at.in_features if isinstance(at, LinearSite) else getattr(at, "width", width)
    states, rows = _apart(axes, source), samples_of(axes, [source])
    if isinstance(site, AttentionSite) and rows is not None and rows.order != "alone":
        return "its samples lie on one axis with what belongs to each"
    if states is None or {str((shape(states) or (0,))[-1]), str(width)} != {str(wanted)}:
        return axes.samples.reason or "its hidden states are not [batch, tokens, width]"
    size, batch = shape(states) or (), axes.batch(states)
    words = dict(enumerate(axes.named.words(states)[:-1]))
    tokens = tuple(k for k, w in words.items() if k != batch and w != "1")
    if batch is None or (others := {words[k] for k in tokens} - {"token", "?"}):
        return f"its hidden states {list(size)} have an axis of {', '.join(others)} beside tokens"  # pyright: ignore
    if packed := packed_by(program, axes.named):
        return f"{packed}: a mean over tokens mixes them"
    valid, causal = valid_of(program, axes, states), is_causal(program, at)
    if len(tokens) > 1 and (causal or valid is not None):
        return "its tokens lie on several axes"
    return Hidden(states, int(width), valid, Axes(batch, tokens), causal and bool(tokens), rows)


def _apart(axes: ShownAxes, source: Node) -> Node | None:
    """The same values with samples on an axis of their own; None where it is not known which are
    of which sample."""
    rows, states = axes.rows(source), source
    while axes.batch(states) is None and is_op(states, VIEWS):
        states = inputs(states)[0]
    batch = axes.batch(states)
    if rows is None or batch is None:
        return None
    if rows[1] == "alone":
        return states
    place, order = rows
    laid = [str(s) for s in shape(source) or ()]
    own = [str(s) for s in shape(states) or ()]
    if len(own) == len(laid) + 1 and (own[:place], own[place + 2 :]) == (
        laid[:place],
        laid[place + 1 :],
    ):
        return states
    graph, dense = source.graph, torch.contiguous_format
    with graph.inserting_after(source):
        count = graph.call_function(ATEN.sym_size.int, (states, batch))
    count.meta["val"] = value(states).shape[batch]
    sizes = [count, -1] if order == "slow" else [-1, count]
    with graph.inserting_after(count):  # strides of a merged axis do not part for all sizes alike
        laid_out = graph.call_function(ATEN.clone.default, (source,), {"memory_format": dense})
    with graph.inserting_after(laid_out):
        parted = graph.call_function(ATEN.unflatten.int, (laid_out, place, sizes))
    numbers = [s.meta["val"] if isinstance(s, Node) else s for s in sizes]
    with value(source).fake_mode:
        laid_out.meta["val"] = value(source).clone(memory_format=dense)
        parted.meta["val"] = value(laid_out).unflatten(place, numbers)
    return parted


def samples_of(axes: ShownAxes, values: Iterable[Node]) -> Samples | None:
    """Where samples lie in some values; None where they differ, or it is not known."""
    rows = {axes.rows(value) for value in values}
    one = rows.pop() if len(rows) == 1 else None
    return None if one is None else Samples(*one)


def is_causal(program: State, site: Site) -> bool:
    """Whether the tokens that a site reads may not learn of later ones.

    What the queries of a cross-attention look at may, and so may all where attention is
    bidirectional; a token mixer that is no attention counts as causal.
    """
    cores = [s for s in program.sites if isinstance(s, AttentionSite)]
    if any(c.cross and site.id in (c.k, c.v) for c in cores):
        return False
    mixing = [s for s in program.sites if isinstance(s, AttentionSite | MixerSite)]
    near = [s for s in mixing if s.stream == site.stream] if site.stream else mixing
    return any(isinstance(s, MixerSite) or (s.causal and not s.cross) for s in near)


def behind_of(gm: GraphModule, output: Node, add: Node, like: Node) -> Value | None:
    """See `Editor.behind`: copies what lies between a sublayer's output and the stream, and moves
    the axes back; None if the shape, that of `like`, changes for another reason."""
    above = set(ancestors(add))
    path: dict[Node, None] = {output: None}
    for node in gm.graph.nodes:
        if node in above and any(i in path for i in node.all_input_nodes):
            path[node] = None
    del path[output]
    moves = [n for n in path if is_op(n, ATEN.permute.default)]
    if post_norm(add):
        path[users(add)[0]] = None
    outer = {i.name: i for n in path for i in n.all_input_nodes if i not in path}
    place = latest(gm, outer)
    copies: dict[Node, Node] = {}
    for target in dict.fromkeys(map(written, path)):
        if target is not None and target not in path:  # what is copied reads it as it was, too
            with gm.graph.inserting_after(place):
                place = copies[target] = gm.graph.call_function(ATEN.clone.default, (target,))
            place.meta["val"] = value(target)
    for node in path:
        with gm.graph.inserting_after(place):
            place = gm.graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node] = place
    for move in reversed(moves):
        order: Any = move.args[1]
        place = _permuted(gm, place, [order.index(i) for i in range(len(order))])
    return place if str(shape(place)) == str(shape(like)) else None


def _permuted(gm: GraphModule, states: Node, order: list[int]) -> Node:
    with gm.graph.inserting_after(states):
        permuted = gm.graph.call_function(ATEN.permute.default, (states, order))
    with value(states).fake_mode:
        permuted.meta["val"] = value(states).permute(order)
    return permuted


def post_norm(add: Node) -> bool:
    """Whether the norm behind a sum is that of a post-norm block: alone, and of a stream that is
    normed itself (the norm behind the last block of a pre-norm model alone reads the sum, too)."""
    after = users(add)
    alone = len(after) == 1 and is_op(after[0], _TOKEN_NORMS)
    return alone and any(is_op(strip(i, CASTS), _TOKEN_NORMS) for i in inputs(add))
