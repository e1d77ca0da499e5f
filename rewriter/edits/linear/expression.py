"""Putting one thing in the place of another: an expression for a stored tensor, and for a branch
what training left of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...branches.branch import Branch, Expression, Serial
from ...branches.prompts import Tokens
from ...errors import PassError
from ...graph.aten import (
    ATEN,
    VIEWS,
    ancestors,
    dense_of,
    entry_of,
    expressed,
    expression_of,
    inputs,
    outdate,
    strip,
    value,
)
from ...graph.sharded import whole
from ...graph.weighted_call import WeightedCall
from ...program.sites import WeightSite
from ...program.state import State
from ...weights.weight import Weight, stored_site
from ..calls.attach import Attaching, wide
from ..calls.call import branch_call, move_before
from .compose import compose
from .forms import read_parts, read_value, values_of


def express(
    edit: Attaching, names: Sequence[str], branch: Expression, path: str, reads: Mapping[str, Node]
) -> Node:
    """See `Editor.express`; the call stands behind those that express the tensors already.

    Otherwise it stands before the first reader: in the reader's block, and held no longer than
    needed.
    """
    graph = edit.graph_module.graph
    chains = [_chain(edit, name) for name in names]
    currents = [chain[-1] for chain in chains]
    readers = [_readers(chain, name) for chain, name in zip(chains, names, strict=True)]
    wanted = {reader for of_one in readers for reader in of_one}
    first = next((n for n in graph.nodes if n in wanted), None)
    late = first is not None and (len(names) > 1 or expression_of(currents[0]) is None)
    if late and first is not None:
        for current in currents:
            move_before(current, first)
    place = graph.inserting_before(first) if late else graph.inserting_after(max(currents))
    with place:
        call = branch_call(edit.graph_module, path, tuple(currents), reads)
    values = [call] if len(names) == 1 else _entries(call, names)
    for name, value_node, chain, of_one in zip(names, values, chains, readers, strict=True):
        value_node.meta |= {"expression": name, "previous": value(chain[-1])}
        for reader in of_one:
            for source in chain:
                reader.replace_input_with(source, value_node)
    return call


def _chain(edit: Attaching, name: str) -> list[Node]:
    """The nodes that load a stored tensor, and the expressions of it one behind the other."""
    if (site := stored_site(edit.program, name)) is not None:
        read_value(edit, site)
    chain = values_of(edit.graph_module.graph, name)
    if not chain:
        raise PassError(f"the graph reads no stored tensor {name!r}, so none can be expressed.")
    current = chain[0]
    while values := expressed(current):
        current = values[0]
    return [n for n in chain if n is not current] + [current]


def _readers(chain: Sequence[Node], name: str) -> dict[Node, None]:
    """What reads a stored tensor, expressions of it aside."""
    every = dict.fromkeys(r for s in (chain[-1], *chain[:-1]) for r in s.users)
    return {r: None for r in every
            if expression_of(r) != name and name not in r.meta.get("expressions", ())}  # fmt: skip


def _entries(call: Node, names: Sequence[str]) -> list[Node]:
    """The values of a call that computes several stored tensors."""
    call.meta["expressions"] = tuple(names)
    values: list[Node] = []
    for place in range(len(names)):
        with call.graph.inserting_after(values[-1] if values else call):
            values.append(call.graph.call_function(operator.getitem, (call, place)))
    return values


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
    call, weight = edit.node(site.nodes[0]), edit.weight(site)
    if "expressed" in call.meta:  # lowered: the expression is called beside its linear
        with torch.no_grad():
            branch: Any = edit.graph_module.get_submodule(str(call.target))
            _, stored, *_ = inputs(call)
            return _own_rows(branch(_evaluated(edit, site, stored)), weight, site)
    parts = WeightedCall.of(call)
    node = None if parts is None else strip(parts.weight, VIEWS)
    if not isinstance(node, Node) or expression_of(node) is None:
        return _own_rows(weight.dense(), weight, site)
    with torch.no_grad():
        tensor = _evaluated(edit, site, node)
    return _own_rows(weight.shape.matrix(tensor), weight, site)


def _evaluated(edit: Attaching, site: WeightSite, node: Any) -> Any:
    """The value of a stored tensor, of an expression, or of a module that reads constants."""
    if (name := dense_of(node)) is not None:
        source = stored_site(edit.program, name) or site
        return edit.weight(source).tensor()
    if node.op == "get_attr":
        return edit.graph_module.get_parameter(str(node.target)).detach()
    values = [_evaluated(edit, site, i) for i in node.args if isinstance(i, Node)]
    if node.op == "call_function":
        return values[0][entry_of(node)]
    if any(n.op == "placeholder" for n in ancestors(node)):
        raise PassError(
            f"{site.id}: its weight is computed from {', '.join(node.kwargs)} on every forward, so "
            "it has no value yet. Bake that adapter first, or select other sites with where=."
        )
    reads = {k: _evaluated(edit, site, n) for k, n in node.kwargs.items()}
    return edit.graph_module.get_submodule(str(node.target))(*values, **reads)


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
    if isinstance(old, Tokens) and isinstance(new, Tokens):
        new.tokens_first, new.front, new.place = old.tokens_first, old.front, old.place
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
            if not getattr(new, "chooses_sizes", False):
                outdate(node)
    edit.edited.append(attachment.site)


def unexpress(call: Node) -> None:
    """Takes a call out of the graph whose operands take the place of what it gives."""
    entries = list(call.users) if "expressions" in call.meta else []
    for entry in entries:
        source: Any = call.args[entry_of(entry)]
        entry.replace_all_uses_with(source)
        call.graph.erase_node(entry)
    if not entries:
        call.replace_all_uses_with(call.all_input_nodes[0])
    call.graph.erase_node(call)


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
            unexpress(node)
        if isinstance(site, WeightSite):
            read_parts(edit, site)
    elif isinstance(site, WeightSite):
        for name in site.nodes:
            compose(edit.program, edit.node(name), site.weight)
    gm.delete_submodule(path)
    edit.edited.append(gone.site)
