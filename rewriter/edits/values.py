"""Values of the graph that branches may read beside their own operand.

A method holds them as opaque handles: what enters a site, which tokens are real, a module that is
evaluated once a forward and feeds many sites.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule, Node

from ..aten import (
    ATEN,
    data_index,
    inputs,
    operands,
    placeholders,
    shape,
    submodule,
    users,
    value,
)  # fmt: skip
from ..errors import PassError
from ..sites.sites import LinearSite, SublayerSite
from .samples import sample_axis
from .tokens import PadTokens, meaning_of

if TYPE_CHECKING:
    from ..program import Program
    from ..sites.sites import Site

Value = Node
"""A value of the graph; methods only hand it on."""


def input_of(site: Site, nodes: Mapping[str, Node]) -> Value:
    """What enters a site: a linear's operand, or the residual that a sublayer adds to."""
    node = nodes[site.nodes[0]]
    if isinstance(site, LinearSite):
        found = operands(node)[data_index(node)]
        while isinstance(found, Node) and found.meta.get("composed") == _key(node):
            found = found.args[0]  # before the input scales of this linear
    elif isinstance(site, SublayerSite):
        add = nodes[site.nodes[1]]
        found = next((a for a in add.args[:2] if a is not node), None)
    else:
        found = inputs(node)[0]
    if not isinstance(found, Node):
        raise PassError(f"{site.id} has no input that a branch could read.")
    return found


def _key(call: Node) -> str:
    return str(call.meta.get("call", call.name))


def valid_of(program: Program, states: Node) -> Value | None:
    """Which tokens of hidden states are real, bool `[batch, tokens]`; None if none is padding."""
    gm = program.module
    size = shape(states)
    if size is None:
        raise PassError(f"{states.name} has no recorded shape.")
    sizes = {program.symbols.get(str(s), str(s)) for s in size}
    for source in placeholders(gm).values():
        padded = next((u for u in users(source) if isinstance(submodule(gm, u), PadTokens)), source)
        given = shape(padded)
        if given is None or len(given) != 2 or isinstance(given[1], int):
            continue
        if program.symbols.get(str(given[1])) not in sizes or meaning_of(program, source) != "mask":
            continue
        if program.symbols[str(given[1])] in sample_axis(program).names:
            raise PassError(
                f"the padding mask {source.name!r} is [tokens, batch], which branches that average "
                "over tokens do not read. Capture with a mask that is [batch, tokens]."
            )
        name = f"valid_{source.name}"
        known = next((n for n in gm.graph.nodes if n.name == name), None)
        if known is None:
            with gm.graph.inserting_after(padded):
                args = (padded, 0)
                known = gm.graph.create_node("call_function", ATEN.ne.Scalar, args, {}, name=name)
            with value(padded).fake_mode:
                known.meta["val"] = torch.ne(value(padded), 0)
        return known
    return None


def latest(gm: GraphModule, reads: Mapping[str, Value]) -> Node:
    """The node behind which everything in `reads` is known."""
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    return max([last, *reads.values()])  # nodes compare by their places


def item_of(gm: GraphModule, source: Value, key: str | int) -> Value:
    """One entry of a shared module's output; one node however often it is asked for."""
    items = [u for u in source.users if u.target is operator.getitem]
    for item in items:
        if item.args[1] == key:
            return item
    name = f"{source.name}_{str(key).replace('.', '_')}"
    with gm.graph.inserting_after(items[-1] if items else source):
        return gm.graph.create_node("call_function", operator.getitem, (source, key), {}, name=name)


def unshared(gm: GraphModule, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Deletes the shared modules that nothing calls any more; the paths of the others."""
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for path in paths:
        if path not in called:
            gm.delete_submodule(path)
    return tuple(p for p in paths if p in called)
