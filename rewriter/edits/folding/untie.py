"""Untying: the calls of one site get a tensor of their own, under the names that they read it by.

Every name of the tensor goes to one side, so that a model without the tie loads both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Node

from ...errors import FoldError
from ...graph.aten import parameter_of, set_attribute
from ...program.readers import Reader, module_of
from ...program.sites import WeightSite
from ..calls.attach import Attaching


def untie(
    edit: Attaching, site: WeightSite, name: str, calls: Sequence[Node], rest: Sequence[Reader]
) -> WeightSite:
    """Parts a stored tensor of a site into that of its calls and that of all other readers.

    Returns:
        The site with what its calls read now.

    Raises:
        FoldError: a name is read by both sides, or a call reads the tensor through a view.
    """
    program, gm = edit.program, edit.graph_module
    names = program.tensors.names(name)
    mine = [n for n in names if any(_reads_by(call, n) for call in calls)]
    theirs = [n for n in names if n not in mine]
    both = [n for n in mine if any(_reads_by(reader.node, n) for reader in rest)]
    if both or (len(names) > 1 and not (mine and theirs)):
        raise FoldError(
            f"{site.id}: {(both or names)[0]!r} is the name by which {calls[0].name} and "
            f"{rest[0]} both read the tensor, so no model could load two. Choose "
            "fold{tied=both} (change the shared tensor) or fold{tied=keep}."
        )
    moving = mine or [_unused(gm, f"{name}_untied")]
    nodes: list[Node] = [*calls, *_around(calls)]
    if name in moving:  # the first name stays with the calls, the others move
        moving = theirs or [_unused(gm, f"{name}_untied")]
        nodes = [reader.node for reader in rest]
        if not any(_is_view_of(read, name) for node in nodes for read in node.all_input_nodes):
            raise FoldError(
                f"{site.id}: {name} and what {rest[0]} reads overlap in memory, so no model could "
                "load two values. Choose fold{tied=keep}, or give the model tensors of their own."
            )
    own = moving[0]
    tensor = gm.get_parameter(name).detach()
    set_attribute(gm, own, nn.Parameter(tensor, requires_grad=False))
    for node in nodes:
        _redirect(edit, site, node, name, own)
    program.tensors = program.tensors.with_untied(own, moving[1:])
    _rename(edit, {n.name for n in nodes}, name, own)
    fresh = program.sites[site.id]
    if not isinstance(fresh, WeightSite):
        raise FoldError(f"{site.id} has no weight any more.")
    return fresh


def _unused(gm: nn.Module, name: str) -> str:
    """`name`, numbered if a parameter is called so."""
    taken = {n for n, _ in gm.named_parameters()}
    numbered = (f"{name}_{count}" for count in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


def _reads_by(node: Node, name: str) -> bool:
    """Whether a node computes in the module that holds the name."""
    return bool(module_of(node)) and module_of(node) == name.rpartition(".")[0]


def _around(calls: Sequence[Node]) -> list[Node]:
    """Branches around the calls, which may read the weight, too."""
    keys = {call.meta.get("call") or call.name for call in calls}
    graph = calls[0].graph
    return [n for n in graph.nodes if n.meta.get("composed") in keys]


def _redirect(edit: Attaching, site: WeightSite, node: Node, name: str, own: str) -> None:
    """Lets one node read the tensor `own`, through a copy of the views that it reads `name` by."""
    gm = edit.graph_module

    def copied(operand: Node) -> Node | None:
        if operand.op == "get_attr":
            if operand.target != name:
                return None
            with gm.graph.inserting_before(node):
                stored = gm.graph.get_attr(own)
            stored.meta = dict(operand.meta)
            return stored
        source = operand.args[0] if operand.args else None
        if operand.op != "call_function" or not isinstance(source, Node):
            return None
        inner = copied(source)
        if inner is None:
            return None
        with gm.graph.inserting_before(node):
            view = gm.graph.node_copy(operand, lambda n: inner if n is source else n)
        return view

    for operand in list(node.all_input_nodes):
        if not _is_view_of(operand, name):
            continue
        if (view := copied(operand)) is None:
            raise FoldError(f"{site.id}: {node.name} reads {name} in a way that cannot be untied.")
        node.replace_input_with(operand, view)


def _is_view_of(node: Node, name: str) -> bool:
    known = parameter_of(node, depth=64)
    return known is not None and known[0] == name


def _rename(edit: Attaching, nodes: set[str], name: str, own: str) -> None:
    """Sites of the moved readers name the moved tensor; no site is tied by it any more."""
    items: list[Any] = []
    for site in edit.program.sites:
        if getattr(site, "weight", None) == name or getattr(site, "bias", None) == name:
            fields: dict[str, Any] = {"tied": ()} if hasattr(site, "tied") else {}
            if nodes & set(site.nodes):
                fields |= {f: own for f in ("weight", "bias") if getattr(site, f, None) == name}
            site = replace(site, **fields)
        items.append(site)
    edit.program.sites = replace(edit.program.sites, items=tuple(items))
