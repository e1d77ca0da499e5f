"""Finding a region: what lies between two values of one residual stream.

Tokens can be left out of a region that has one way in and one way out and that treats all tokens
alike but for what enters beside the stream (positions, masks). Everything else is refused here.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ...axes.line import Line
from ...branches.routing import Inserted, PutTokens, TakeTokens
from ...errors import PassError
from ...graph.aten import (
    ADDS,
    CASTS,
    CONVS,
    DROPOUTS,
    MULS,
    NORMS,
    VIEWS,
    ancestors,
    inputs,
    is_op,
    named_arguments,
    operands,
    overloads,
    shape,
    submodule,
    users,
    written,
)  # fmt: skip
from ...graph.weighted_call import data_of
from ...program.sites import AttentionSite, EmbeddingSite, LinearSite, SublayerSite, WeightSite
from ...program.state import State
from ..calls.samples import ShownAxes
from ..prompts.packed_rows import packed_by
from ..prompts.pads import StripTokens

_ORDERED = CONVS | overloads(
    "slice", "select", "narrow", "split", "chunk", "unbind", "cumsum", "roll", "flip", "unfold",
    "mean", "sum", "amax", "max", "cat", "sort", "topk", "constant_pad_nd",
)  # fmt: skip
"""Operators that mean something else on fewer tokens, if they work along the token axis."""


@dataclass(frozen=True)
class Region:
    """What lies between two values of a stream.

    Attributes:
        site: id of its first sublayer.
        entry, exit: the stream before and after, `[batch, tokens, width]` or tokens first.
        read: what the first linear reads, the entry itself or its norm; known for all tokens.
        nodes: what is computed from entry or read on the way to exit, in graph order.
        tokens: the size of the token axis, a number or a symbol.
        line, rows: where the stream's tokens lie, and its samples.
        batch: the axis of the samples in the stream, 0 or 1.
    """

    site: str
    entry: Node
    read: Node
    exit: Node
    nodes: tuple[Node, ...]
    tokens: Any
    line: Line
    rows: Line
    batch: int = 0

    def is_tokens(self, size: object) -> bool:
        """Whether a size is the number of tokens."""
        return str(size) == str(self.tokens)

    def has_tokens(self, size: object) -> bool:
        """Whether a size is computed from the number of tokens."""
        if isinstance(size, torch.SymInt) and isinstance(self.tokens, torch.SymInt):
            return bool(size.node.expr.has(self.tokens.node.expr))
        return self.is_tokens(size)


def find_region(
    program: State,
    axes: ShownAxes,
    sites: Sequence[SublayerSite],
    nodes: Mapping[str, Node],
    causal: bool,
    allow: str = "",
    whole: bool = False,
) -> Region:
    """The region of some sublayers of one stream, and of all that lies between them.

    Args:
        program: only read.
        axes: of its values.
        sites: sublayers of one stream.
        nodes: graph nodes by the names that sites use.
        causal: allow attentions in which no token sees a later one.
        allow: the option that the method has for that, which an error names.
        whole: read the entry itself, so that the first norm is inside.

    Raises:
        PassError: it has no single way in and out on all tokens, or tells tokens by their place.
    """
    order = {n: i for i, n in enumerate(program.module.graph.nodes)}
    chain = sorted(sites, key=lambda s: order[nodes[s.nodes[1]]])
    first, entry = chain[0].id, stream_before(program, chain[0], nodes)
    end = stream_behind(program, chain[-1], nodes)
    below, above = _below(entry), _above(end, entry)
    between = [n for n in order if n in below and n in above]
    if any(_inserts(program, i) for n in (entry, *between) for i in (n, *inputs(n))):
        raise PassError(
            f"{first}: the region runs with inserted tokens already. Choose other blocks with "
            "where=, or insert more tokens at once."
        )
    if any(isinstance(submodule(program.module, n), TakeTokens) for n in (entry, *between)):
        raise PassError(
            f"{first}: the region runs on some tokens already. Choose other blocks with where=, or "
            "take the other adapter out first."
        )
    size, after = shape(entry), shape(end)
    if size is None or len(size) != 3 or str(size) != str(after):
        raise PassError(
            f"{first}: the stream is {size} before the region and {after} behind it, but tokens "
            "can be left out of [batch, tokens, width] only. Choose other blocks with where=."
        )
    batch = axes.batch(entry)
    if batch is None:
        why = axes.samples.reason or f"no axis of its stream {size} is that of the samples"
        raise PassError(f"{first}: {why}. Tokens can be left out of [batch, tokens, width] only.")
    if packed := packed_by(program, axes.named):
        raise PassError(
            f"{first}: {packed}, and tokens would be chosen among them all. Give each sample a row "
            "of its own and a padding mask [batch, tokens], or choose another method."
        )
    read = entry if whole else _read(program, between, entry)
    norm = set(ancestors(read, block=lambda n: n is entry))
    inside = tuple(n for n in between if n not in norm)
    rows, line = axes.line(entry, batch), axes.line(entry, 1 - batch)
    region = Region(first, entry, read, end, inside, size[1 - batch], line, rows, batch)
    _check(program, region)
    if not causal:
        _check_causal(program, region, allow)
    return region


def require_attention(program: State, region: Region) -> None:
    """Raises PassError where no token of a region sees another, so that further ones, which leave
    it again, would change nothing."""
    names = {n.name for n in region.nodes}
    own = (s for s in program.sites if isinstance(s, AttentionSite) and not s.cross)
    if not any(names & set(s.nodes) for s in own):
        raise PassError(
            f"{region.site}: no attention of the stream to its own tokens lies in the region, so "
            "tokens inserted there would change nothing. Select that, too: where=attn|ffn."
        )


def _below(entry: Node) -> set[Node]:
    below: set[Node] = set()
    stack = [entry]
    while stack:
        fresh = [u for u in users(stack.pop()) if u not in below]
        below.update(fresh)
        stack += fresh
    return below


def _above(end: Node, entry: Node) -> set[Node]:
    """What `end` is computed from, down from `entry`; also what writes into such values."""
    writers: dict[Node, list[Node]] = {}
    for node in end.graph.nodes:
        target = written(node)
        if target is not None and not node.users:
            writers.setdefault(target, []).append(node)
    above: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in above and node is not entry:
            above.add(node)
            stack += inputs(node) + writers.get(node, [])
    return above


def stream_before(program: State, site: SublayerSite, nodes: Mapping[str, Node]) -> Node:
    """The summand beside a sublayer's output that the output is computed from."""
    output, add = (nodes[n] for n in site.nodes[:2])

    def is_above(root: Node) -> bool:
        between = ancestors(output, block=lambda n: n < root)  # what is earlier needs it not
        return root is not output and any(n is root for n in between)

    stack = [add]
    while stack:
        for operand in inputs(stack.pop()):
            root = operand
            while root is not output and not is_above(root) and _same_tokens(program, root):
                root = inputs(root)[0]
            if root.op != "get_attr" and is_above(root):
                return root
            if is_op(operand, ADDS):
                stack.append(operand)
    raise PassError(f"{site.id}: the stream that it adds to cannot be found.")


def _same_tokens(program: State, node: Node) -> bool:
    if isinstance(submodule(program.module, node), TakeTokens | nn.Dropout):
        return True
    return is_op(node, VIEWS | DROPOUTS) or (is_op(node, MULS) and len(inputs(node)) == 1)


def stream_behind(program: State, site: SublayerSite, nodes: Mapping[str, Node]) -> Node:
    """The stream behind a sublayer: its sum, or the norm of that where norms are in the stream."""
    add = nodes[site.nodes[1]]
    stream = [s for s in program.sites if isinstance(s, SublayerSite) and s.stream == site.stream]
    sums = {nodes[s.nodes[1]] for s in stream}
    entries = [_routed(program, stream_before(program, s, nodes)) for s in stream]
    post = any(is_op(e, NORMS) and inputs(e)[0] in sums for e in entries)
    readers = users(add)
    return readers[0] if post and len(readers) == 1 and is_op(readers[0], NORMS) else add


def _routed(program: State, node: Node) -> Node:
    """What a gather reads, or tokens are inserted in front of; or what a region ends with, in front
    of a scatter, or of what takes inserted tokens off."""
    while True:
        module = submodule(program.module, node)
        if isinstance(module, TakeTokens | StripTokens):
            node = operands(node)[0]
        elif isinstance(module, PutTokens):
            node = operands(node)[2]
        elif is_op(node, operator.getitem) and _inserts(program, inputs(node)[0]):
            node = operands(inputs(node)[0])[0]
        else:
            return node


def _inserts(program: State, node: Node) -> bool:
    return isinstance(submodule(program.module, node), Inserted)


def operand_of(
    program: State, site: SublayerSite, nodes: Mapping[str, Node], beside: Node
) -> Node | None:
    """What the first product of a sublayer reads, before what passes have put in front of it; None
    where it is not laid out like `beside`, or cannot be found."""
    try:
        entry, output = stream_before(program, site, nodes), nodes[site.nodes[0]]
    except PassError:
        return None
    above, below = _above(output, entry), _below(entry)
    weights = [s for s in program.sites if isinstance(s, WeightSite)]
    calls = {n for s in weights if not isinstance(s, EmbeddingSite) for n in s.nodes}
    between = [n for n in output.graph.nodes if n in above and n in below]
    call = next((n for n in between if n.meta.get("call", n.name) in calls), None)
    read = None if call is None else _bare(data_of(call), entry)
    wanted = shape(beside) or ()
    wanted = wanted if beside is output else (*wanted[:-1], site.width)
    return read if read is not None and str(shape(read)) == str(wanted) else None


def _bare(read: Any, entry: Node) -> Node:
    """What a call reads, without what passes have put in front of it, casts and views."""
    while read is not entry and (read.meta.get("composed") or is_op(read, VIEWS | CASTS)):
        read = inputs(read)[0]
    return read


def _read(program: State, between: Sequence[Node], entry: Node) -> Node:
    """What the first linear reads, before what passes have put in front of it."""
    calls = {n for s in program.sites if isinstance(s, LinearSite) for n in s.nodes}
    call = next((n for n in between if n.meta.get("call", n.name) in calls), None)
    read = entry if call is None else _bare(data_of(call), entry)
    return read if read in between and str(shape(read)) == str(shape(entry)) else entry


def _check(program: State, region: Region) -> None:
    """Raises PassError for what makes leaving out tokens wrong."""
    gm, inside = program.module, set(region.nodes)

    def refuse(node: Node, why: str) -> None:
        raise PassError(
            f"{region.site}: {node.name} {why}, so the region cannot run on some tokens only. "
            "Leave this block out with where=."
        )

    mixers = {n for s in program.sites.of("mixer", "conv") for n in s.nodes}
    for node in region.nodes:
        if node.name in mixers:
            refuse(node, "mixes tokens by their order")
        outside = [u for u in users(node) if u not in inside and (u.users or u.op == "output")]
        if outside and node is not region.exit:
            refuse(node, f"is also read by {outside[0].name}, outside of the region")
        if is_op(node, _ORDERED) and _along_tokens(region, node):
            refuse(node, "works along the tokens")
    for node in gm.graph.nodes:
        if node not in inside and written(node) in inside:
            refuse(node, "writes into the region in place")
    for node in (region.entry, *region.nodes):
        size = shape(node)
        if size is None:
            continue
        if region.line.unclear(node):
            refuse(node, f"{size} does not show which axis has the {region.tokens} tokens")
        if isinstance(region.tokens, int) and not region.line.held(node):
            refuse(node, f"{size} has no axis for the {region.tokens} tokens")


def _check_causal(program: State, region: Region, allow: str) -> None:
    remedy = f", or allow it for whole prompts and scoring only, with {allow}" if allow else ""
    names = {n.name for n in region.nodes}
    for site in program.sites:
        if isinstance(site, AttentionSite) and site.causal and names & set(site.nodes):
            raise PassError(
                f"{site.id} is causal: which of its tokens are taken would depend on later ones, "
                f"which generation does not know. Choose an encoder's blocks with where={remedy}."
            )


def _along_tokens(region: Region, node: Node) -> bool:
    given = named_arguments(node)
    source: Any = given.get("self", given.get("tensors"))
    source = source[0] if isinstance(source, list | tuple) and source else source
    size = shape(source)
    axes = given.get("dim", 0)
    if is_op(node, CONVS):
        return True
    if size is None or not size or axes is None:
        return size is not None and bool(size)
    listed = axes if isinstance(axes, list | tuple) else (axes,)
    alone = region.line.alone(source)
    return any(int(a) % len(size) in alone for a in listed if isinstance(a, int))
