"""Heads of keys and values that several query heads share, written out for each of these.

A repetition gives every group as many query heads. Behind it here, each group is repeated for
itself, so that query heads go one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ...branches.prompts import KeyValue
from ...errors import PassError
from ...graph.aten import ATEN, VIEWS, is_op, named_arguments, overloads, shape, submodule, value
from ...program.sites import AttentionSite
from ...program.state import State
from ...tracing.propagate import propagate
from ..attention.causal import unrepeated
from ..attention.keyvalue import core_operands


def part_groups(program: State, site: AttentionSite) -> None:
    """Repeats each head of keys and values for itself; nothing changes what is computed.

    Raises:
        PassError: where they are repeated cannot be found, or rows stand in front of them.
    """
    if site.heads == site.kv_heads or site.parted:
        return
    gm = program.module
    nodes = {n.meta.get("call", n.name): n for n in gm.graph.nodes}
    core = nodes[site.nodes[0]]
    if "val" not in core.meta:  # an earlier cut was here
        propagate(program)
    if len(shape(core) or ()) != 4:
        raise PassError(
            f"{site.id}: its heads share an axis with the samples. Leave it out with where=."
        )
    both = core_operands(gm, core)
    for operand, reader in ((both.key, both.product), (both.value, core)):
        repetition, source = _repeated(program, site, operand)
        whole = _written(source, site)
        if repetition is None:
            reader.replace_input_with(operand, whole)
        else:
            repetition.replace_all_uses_with(whole)
            gm.graph.erase_node(repetition)
    parted = replace(site, parted=True, kv_heads=site.heads)
    items = tuple(parted if s.id == site.id else s for s in program.sites)
    program.sites = replace(program.sites, items=items)


def _repeated(program: State, site: AttentionSite, operand: Node) -> tuple[Node | None, Node]:
    """(the node that repeats heads, what it repeats); (None, operand) where the attention does."""
    node: Any = operand
    while isinstance(node, Node):
        if (source := unrepeated(node)) is not None:
            return node, source
        if is_op(node, overloads("repeat_interleave")):
            given = named_arguments(node)
            if given.get("dim") in (1, -3) and isinstance(given.get("repeats"), int):
                return node, given["self"]
        if not is_op(node, VIEWS):
            break
        node = node.args[0]
    sizes = shape(operand) or ()
    if sizes[1:2] == (site.kv_heads,):
        return None, operand
    rows = any(isinstance(submodule(program.module, n), KeyValue) for n in node.all_input_nodes)
    why = "rows stand in front of its keys" if rows else "where keys are repeated is not known"
    raise PassError(
        f"{site.id}: its query heads cannot go one by one, because {why}. Use "
        "head_pruning{groups=whole}, or insert prefixes afterwards."
    )


def _written(source: Node, site: AttentionSite) -> Node:
    """`[batch, kv_heads, ...]` with each head repeated for its queries: `[batch, heads, ...]`."""
    graph, times = source.graph, site.heads // site.kv_heads
    place, parts = source, []
    sizes = [-1, times, -1, -1]

    def call(operator: Callable[..., Any], *args: Any) -> Node:
        nonlocal place
        with graph.inserting_after(place):
            place = graph.call_function(operator, args)
        first = args[0]
        with value(source).fake_mode:
            operand = [value(n) for n in first] if isinstance(first, list) else value(first)
            place.meta["val"] = operator(operand, *args[1:])
        return place

    for head in range(site.kv_heads):
        one = call(ATEN.slice.Tensor, source, 1, head, head + 1)
        parts.append(call(ATEN.expand.default, one, sizes))
    return call(ATEN.cat.default, parts, 1)
