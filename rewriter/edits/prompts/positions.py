"""Edits that move the tokens' positions behind rows in front of the keys, as a cache would.

Absolute positions (learnt tables, rotary angles) grow by the number of rows. Biases by distance get
columns for the rows, which stand before the first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.aten import (
    ADDS,
    ATEN,
    CASTS,
    MATMULS,
    VIEWS,
    ancestors,
    inputs,
    is_float,
    is_op,
    overloads,
    shape,
    strip,
    submodule,
    users,
)  # fmt: skip
from ...program.sites import AttentionSite
from ...program.state import State
from ..attention.keyvalue import WidenMask, add_call
from ..calls.samples import sample_axis
from .tokens import shorter

_WAVES = overloads("cos", "sin")
_RANGES = overloads("arange")


class WidenBias(WidenMask):
    """Lets every query see more keys on the left, at a distance: `rows [1, heads, S, length]`."""

    def __init__(self, length: int) -> None:
        super().__init__(length, 0.0)

    def forward(self, mask: Tensor, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        left = rows.to(mask.dtype).expand(*mask.shape[:-1], self.length)
        return torch.cat([left, mask], dim=-1)


def shift_positions(program: State, length: int, keys: bool = False) -> None:
    """Counts the tokens of every stream whose attentions have rows in front from `length` on.

    Args:
        program: which is changed.
        length: how many rows there are.
        keys: biases by distance count so among keys alone, where queries count from 0 on (the rows
            stand at 0 to `length - 1`); absolute positions stay.

    Raises:
        PassError: the model knows no positions.
    """
    apart = set(_without_rows(program))
    moved = keys or _shift_absolute(program, length, apart)
    related = [n for n in _relative(program) if n not in apart]
    for table in related:
        _widen_bias(program.module, table, length, keys)
    if not moved and not related:
        raise PassError("the model has no positions to shift; use shift_positions=false.")


def _without_rows(program: State) -> Iterator[Node]:
    """What streams without rows are computed from, up to their attentions."""
    own = [s for s in program.sites if isinstance(s, AttentionSite) and not s.cross]
    prefixed = {s.stream for s in own if program.attached(s.id)}
    nodes = {n.name: n for n in program.module.graph.nodes}
    for site in own:
        if site.stream not in prefixed:
            yield from ancestors(nodes[site.nodes[0]])


def _shift_absolute(program: State, length: int, apart: set[Node]) -> bool:
    gm = program.module
    targets: list[tuple[Node, int]] = []
    learnt: set[str] = set()
    for site in program.sites:
        if site.kind == "embedding" and site.role == "position":
            node = next(n for n in gm.graph.nodes if n.name == site.nodes[0])
            if node in apart:
                continue
            targets.append((node, 1))
            learnt |= {
                program.symbols[t] for d in shape(node) or () if (t := str(d)) in program.symbols
            }
    targets += [(node, i) for node, i in angles(gm) if node not in apart]
    for node, index in targets:
        position: Any = node.args[index]
        rows = isinstance(position, list | tuple)  # `table[positions]` instead of a lookup
        with gm.graph.inserting_before(node):
            start = position[0] if rows else position
            moved = gm.graph.call_function(ATEN.add.Tensor, (start, length))
        node.update_arg(index, [moved] if rows else moved)
    for label in sorted(n for n in learnt - sample_axis(program).names if n):
        program.spec = shorter(program, label, length)
    return bool(targets)


def angles(gm: GraphModule) -> Iterator[tuple[Node, int]]:
    """The products of positions and frequencies below sines, and which operand is the position."""
    seen: set[Node] = set()
    products = MATMULS | overloads("outer", "mul")
    for wave in gm.graph.nodes:
        if not is_op(wave, _WAVES):
            continue
        for node in ancestors(wave, block=lambda n: is_op(n, MATMULS | overloads("outer"))):
            two = [a for a in node.args[:2] if isinstance(a, Node)]
            if node in seen or not is_op(node, products) or len(two) != 2:
                continue
            seen.add(node)
            yield from ((node, i) for i, a in enumerate(two) if _counts(a))


def _counts(node: Node) -> bool:
    """Whether a value is a position: cast from a range, a running sum or an integer input."""
    source = strip(node, VIEWS | CASTS | ADDS)
    if source.op == "placeholder":
        return not is_float(source)
    return is_op(source, overloads("arange", "cumsum", "sub"))


def _relative(program: State) -> list[Node]:
    """The lookups of biases by distance."""
    nodes = {n.name: n for n in program.module.graph.nodes}
    sites = program.sites.of("embedding")
    return [nodes[n] for s in sites if s.role == "relative" for n in s.nodes]


def _widen_bias(gm: GraphModule, table: Node, length: int, moved: bool) -> None:
    """Gives the masks that a lookup goes into columns of its own for the rows.

    The lookup is computed once more for keys at `-length .. -1`; or, with keys `moved`, at
    `0 .. length - 1`, and for those of the tokens from `length` on.
    """
    top = table
    while len(users(top)) == 1 and is_op(users(top)[0], VIEWS):
        top = users(top)[0]
    keys = [n for n in ancestors(table) if is_op(n, _RANGES) and _along_keys(n)]
    masks = [
        n for n in gm.graph.nodes
        if type(submodule(gm, n)) is WidenMask and top in set(ancestors(n))
    ]  # fmt: skip
    if len(keys) != 1 or not masks:
        raise PassError(
            f"{table.name}: a bias by distance whose keys are no plain range cannot be continued "
            "to the rows. Use shift_positions=false."
        )
    rows = _for_rows(gm, keys[0], top, (0, length) if moved else (-length, 0))
    if moved:
        with gm.graph.inserting_after(keys[0]):
            later = gm.graph.call_function(ATEN.add.Tensor, (keys[0], length))
        keys[0].replace_all_uses_with(later, delete_user_cb=lambda user: user is not later)
    for mask in masks:
        with gm.graph.inserting_before(mask):
            call = add_call(gm, "widen_bias", WidenBias(length), (inputs(mask)[0], rows))
        mask.replace_all_uses_with(call)
        gm.graph.erase_node(mask)


def _along_keys(node: Node) -> bool:
    """Whether a range lies along the last axis of what it is made into."""
    following = users(node)
    while len(following) == 1 and is_op(following[0], VIEWS):
        node, following = following[0], users(following[0])
    sizes = shape(node) or ()
    return len(sizes) > 1 and sizes[-1] != 1


def _for_rows(gm: GraphModule, keys: Node, top: Node, places: tuple[int, int]) -> Node:
    """`top` for the keys of a range."""
    copies: dict[Node, Node] = {}
    above = set(ancestors(top))
    with gm.graph.inserting_after(top):
        options = dict(keys.kwargs)
        copies[keys] = current = gm.graph.call_function(ATEN.arange.start, places, options)
    for node in gm.graph.nodes:
        if node in above and any(i in copies for i in inputs(node)):
            with gm.graph.inserting_after(current):
                current = gm.graph.node_copy(node, lambda n: copies.get(n, n))
            current.meta.pop("val", None)
            copies[node] = current
    return copies[top]
