"""Giving a linear or convolution without bias one of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...branches.branch import RowScale
from ...errors import PassError
from ...graph.aten import (
    ADDS,
    ATEN,
    attribute,
    is_op,
    parameter_of,
    set_attribute,
    users,
    value,
)  # fmt: skip
from ...graph.weighted_call import WeightedCall, take_bias
from ...program.sites import ConvSite, LinearSite
from ...program.state import State
from ..calls.attach import Attaching
from .compose import at_weight, compose, composed_value


def add_bias(edit: Attaching, site: LinearSite | ConvSite) -> str:
    """See `Editor.add_bias`."""
    gm, program = edit.graph_module, edit.program
    if isinstance(site, ConvSite):
        weight, size = gm.get_parameter(site.weight), site.channels[1]
    else:
        weight = edit.weight(site)
        size = weight.out_features
    calls = [edit.node(call) for call in site.nodes]
    own = {_taken(gm, call) or _own_bias(gm, composed_value(call), size) for call in calls}
    if len(own) == 1 and (bias := own.pop()) is not None:
        return bias
    name = _bias_name(program, site.weight)
    if name in program.added:
        return name
    if any(_given(call) is not None for call in calls):
        raise PassError(
            f"{site.id} has a bias already, which is no parameter or not that of all its calls. "
            "Select other sites with where=."
        )
    zeros = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    set_attribute(gm, name, nn.Parameter(zeros, requires_grad=False))
    program.tensors = program.tensors.with_added(name)
    for call in calls:
        _add(edit, site, call, name, size)
    return name


def _given(call: Node) -> Any:
    """What a call's operator adds to its product."""
    parts = WeightedCall.of(call)
    return None if parts is None else parts.bias


def _taken(gm: nn.Module, call: Node) -> str | None:
    """The parameter that a call's operator adds to its product."""
    named = parameter_of(_given(call))
    return named[0] if named and isinstance(attribute(gm, named[0]), nn.Parameter) else None


def _add(edit: Attaching, site: LinearSite | ConvSite, node: Node, name: str, size: int) -> None:
    graph = edit.graph_module.graph
    with graph.inserting_before(node):
        bias = graph.get_attr(name)
    if take_bias(node, bias):
        bias.meta["val"] = _fake(node, size)  # no shape changes, so none is recomputed
        _know_bias(edit.program, site.weight, name)
        if any(a.slot == RowScale.slot for a in at_weight(edit.program, site.weight)):
            compose(edit.program, node, site.weight)  # a row scale leaves the bias alone
    else:
        with graph.inserting_before(node):
            if isinstance(site, LinearSite) and site.left:
                bias = graph.call_function(ATEN.unsqueeze.default, (bias, -1))
        node = composed_value(node)  # what is composed around a call stays together
        with graph.inserting_after(node):
            added = graph.call_function(ATEN.add.Tensor, (node, bias))
        node.replace_all_uses_with(added, delete_user_cb=lambda u: u is not added)


def _own_bias(gm: nn.Module, call: Node, size: int) -> str | None:
    """The parameter `[size]` that the model adds to a call's value."""
    for add in (u for u in users(call) if is_op(u, ADDS)):
        for other in add.args[:2]:
            parameter = parameter_of(other) if other is not call else None
            tensor = attribute(gm, parameter[0]) if parameter is not None else None
            if (
                isinstance(tensor, nn.Parameter)
                and tensor.shape == (size,)
                and parameter is not None
            ):
                return parameter[0]
    return None


def _bias_name(program: State, weight: str) -> str:
    """Where the added bias of a weight is kept; the model's own tensors keep their names."""
    stem, _, leaf = weight.rpartition(".")
    name = f"{stem}.bias".lstrip(".") if leaf == "weight" else f"{weight}_bias"
    if name in program.added:
        return name
    own = {n for n, _ in program.module.named_parameters()} | set(program.extras)
    return f"{name}_added" if name in own else name


def _know_bias(program: State, weight: str, bias: str) -> None:
    sites = program.sites
    items = tuple(
        replace(s, bias=bias) if isinstance(s, LinearSite | ConvSite) and s.weight == weight else s
        for s in sites
    )
    program.sites = replace(sites, items=items)


def _fake(node: Node, size: int) -> Tensor | None:
    """A fake vector of the kind of a node's value."""
    val: Any = value(node)
    if val is None:
        return None
    with val.fake_mode:
        return val.new_empty([size])
