"""Putting one thing in the place of another: an expression for a stored tensor, and for a branch
what training left of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...branches.branch import Branch, Expression, Serial
from ...errors import PassError
from ...graph.aten import ATEN, VIEWS, expression_of, outdate, strip, value
from ...graph.sharded import whole
from ...graph.weighted_call import WeightedCall
from ...program.sites import WeightSite
from ...program.state import State
from ...weights.weight import Weight, stored_site
from ..calls.attach import Attaching, wide
from ..calls.call import branch_call
from .compose import compose
from .forms import read_parts, read_value, values_of


def express(
    edit: Attaching, name: str, branch: Expression, path: str, reads: Mapping[str, Node]
) -> Node:
    """See `Editor.express`; the call stands behind those that express the tensor already.

    Otherwise it stands before its first reader: in the reader's block, and held no longer than
    needed.
    """
    graph = edit.graph_module.graph
    if (site := stored_site(edit.program, name)) is not None:
        read_value(edit, site)
    stored = values_of(graph, name)
    if not stored:
        raise PassError(f"the graph reads no stored tensor {name!r}, so none can be expressed.")
    current = stored[0]
    while chained := [u for u in current.users if expression_of(u) == name]:
        current = chained[0]
    sources = dict.fromkeys((current, *stored))
    readers = dict.fromkeys(r for s in sources for r in s.users if expression_of(r) != name)
    first = next((n for n in graph.nodes if n in readers), None)
    late = first is not None and current is stored[0]
    with graph.inserting_before(first) if late else graph.inserting_after(current):
        call = branch_call(edit.graph_module, path, (current,), reads)
    call.meta |= {"expression": name, "previous": value(current)}
    for reader in readers:
        for source in sources:
            reader.replace_input_with(source, call)
    return call


def widened(edit: Attaching, name: str) -> Tensor:
    """A copy of a stored tensor in the dtype that it trains in; the graph casts it back."""
    stored = edit.graph_module.get_parameter(name).detach()
    wide_copy = stored.to(wide(stored.dtype), copy=True)
    if wide_copy.dtype == stored.dtype:
        return wide_copy
    graph = edit.graph_module.graph
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target == name]:
        node.meta.pop("val", None)
        with graph.inserting_after(node):
            cast = graph.call_function(ATEN.to.dtype, (node, stored.dtype))
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    return wide_copy


def matrix_of(edit: Attaching, site: WeightSite) -> Tensor:
    """See `Editor.matrix`."""
    parts, weight = WeightedCall.of(edit.node(site.nodes[0])), edit.weight(site)
    node = None if parts is None else strip(parts.weight, VIEWS)
    chain: list[Node] = []
    while isinstance(node, Node) and expression_of(node) is not None:
        chain.append(node)
        node = node.args[0] if node.args else None
    if not chain:
        return _own_rows(weight.dense(), weight, site)
    tensor = None if node is None else weight.tensor()
    with torch.no_grad():
        for call in reversed(chain):
            if call.kwargs:
                raise PassError(
                    f"{site.id}: its weight is computed from {', '.join(call.kwargs)} on every "
                    "forward, so it has no value yet. Bake that adapter first, or select other "
                    "sites with where=."
                )
            branch = edit.graph_module.get_submodule(str(call.target))
            tensor = branch() if tensor is None else branch(tensor)
    if tensor is None:
        raise PassError(f"{site.id} has no stored weight.")
    return _own_rows(weight.shape.matrix(tensor), weight, site)


def _own_rows(dense: Tensor, weight: Weight, site: WeightSite) -> Tensor:
    if site.features is None:
        return dense
    return dense.unflatten(0, (weight.shape.count, -1))[:, list(site.features)].flatten(0, 1)


def settle(edit: Attaching, path: str, decided: Mapping[str, Any]) -> None:
    """See `Editor.settle`."""
    gm = edit.graph_module
    attachment = next((a for a in edit.program.attachments if a.path == path), None)
    old = gm.get_submodule(path)
    if attachment is None or not isinstance(old, Branch):
        raise PassError(f"there is no branch {path!r} to settle.")
    new = old.settled(**decided)
    left = {k: n for k, n in attachment.reads.items() if k not in decided}
    if new is None:
        remove(edit, attachment.path)
        return
    new.axis, new.features, new.lowered = old.axis, old.features, old.lowered
    new.train(old.training)
    if edit.program.held(attachment.adapter):
        new.requires_grad_(False)
    parent, _, leaf = path.rpartition(".")
    setattr(gm.get_submodule(parent), leaf, new)
    fresh = replace(attachment, reads=left)
    kept = (fresh if a is attachment else a for a in edit.program.attachments)
    edit.program.attachments = tuple(kept)
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target == path:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in decided}
            outdate(node)
    edit.edited.append(attachment.site)


def remember(program: State, path: str) -> None:
    """Keeps the values of a branch that leaves the graph."""
    state = program.module.get_submodule(path).state_dict()
    values = {f"{path}.{n}": whole(t).detach().clone() for n, t in state.items()}
    program.tensors = program.tensors.with_removed(values)


def remove(edit: Attaching, path: str) -> None:
    """Takes a weight's branch, one behind a sublayer, or the expression of a stored tensor out of
    the graph."""
    gm = edit.graph_module
    gone = next(a for a in edit.program.attachments if a.path == path)
    site = edit.program.sites[gone.site]
    branch = gm.get_submodule(path)
    passing = isinstance(branch, Expression | Serial)
    if not passing and not isinstance(site, WeightSite):
        raise PassError(
            f"{gone.site}: {path} cannot be removed: a {branch.slot} branch is no part that the "
            "graph does without. Leave its adapter out: program.without(...)."
        )
    edit.program.attachments = tuple(a for a in edit.program.attachments if a is not gone)
    if passing:
        for node in [n for n in gm.graph.nodes if n.op == "call_module" and n.target == path]:
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
        if isinstance(site, WeightSite):
            read_parts(edit, site)
    elif isinstance(site, WeightSite):
        for name in site.nodes:
            compose(edit.program, edit.node(name), site.weight)
    gm.delete_submodule(path)
    edit.edited.append(gone.site)
