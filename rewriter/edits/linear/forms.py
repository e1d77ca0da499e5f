"""How the calls of a weight read it: a dense tensor, the parts of a stored format, or the dense
value of these, computed anew.

    dense     linear(x, W)
    parts     quantised_linear(x, codes, scale, zero)         linears and lookups
    a value   conv(x, view(dequantise(codes, scale, zero)))   any other call, and all whose weight
                                                              has expressions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from ...branches.shapes import EmbeddingShape
from ...errors import PassError
from ...graph.aten import ATEN, EMBEDDING, dense_of, is_op, named_arguments, value
from ...graph.stored_call import Stored, StoredCall, Unpacked
from ...graph.weighted_call import INDEX, WeightedCall, linear_call, linear_parts
from ...program.sites import ConvSite, EmbeddingSite, ExpertsSite, LinearSite, WeightSite
from ...weights.weight import Weight, columns_of, put_format
from ..calls.attach import Attaching


def store_as(edit: Attaching, site: WeightSite, weight: Weight) -> list[Node]:
    """Stores the weight of a site in the format that `weight` has, dense or not; returns the calls
    that read that, around which branches are still composed as before."""
    read_value(edit, site)
    graph = edit.graph_module.graph
    old = values_of(graph, site.weight)
    tensors = weight.tensors()
    put_format(edit.graph_module, site.weight, tensors)
    for node in old:
        if not node.users:
            _erase(graph, node)
            continue
        first = next(n for n in graph.nodes if n in node.users)
        with graph.inserting_before(first):
            parts = [graph.get_attr(name) for name in tensors]
            new = parts[0] if weight.is_dense else dense_value(
                graph, site, _stored(weight, parts), weight, first
            )  # fmt: skip
        node.replace_all_uses_with(new)
        _erase(graph, node)
    return read_parts(edit, site)


def _stored(weight: Weight, parts: Sequence[Node]) -> Stored:
    form = weight.format
    return Stored(form.operator, dict(zip(form.parts, parts, strict=True)), form.integers)


def values_of(graph: Graph, name: str) -> list[Node]:
    """The nodes that are a stored tensor, dense or computed from parts."""
    return [
        n for n in graph.nodes
        if (n.op == "get_attr" and n.target == name) or dense_of(n) == name
    ]  # fmt: skip


def _erase(graph: Graph, node: Node | None) -> None:
    """Takes a value that nothing reads out of the graph, with what only it reads."""
    if node is None or node.users:
        return
    read = node.all_input_nodes
    graph.erase_node(node)
    for source in read:
        _erase(graph, source)


def dense_value(graph: Graph, site: WeightSite, stored: Stored, weight: Weight, near: Node) -> Node:
    """Adds the nodes of the dense tensor of a stored format, laid out as the model's own.

    Args:
        near: what reads it, for the place in the model.
    """
    operator, args = stored.dense(columns_of(site))
    steps = [(operator, args)]
    if weight.format.dtype != weight.dtype:
        steps.append((ATEN.to.dtype, (weight.dtype,)))
    steps += _laid_out(site)
    node: Any = None
    for target, rest in steps:
        node = graph.call_function(target, rest if node is None else (node, *rest))
        node.meta = {k: v for k, v in near.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta["dense"] = site.weight
    return node


def _laid_out(site: WeightSite) -> list[tuple[Any, tuple[Any, ...]]]:
    """From `[rows, columns]` of a format to the model's own layout: operators, with what they take
    behind their operand."""
    count, out, size = site.matrices
    if isinstance(site, LinearSite):
        return [(ATEN.t.default, ())] if site.in_out else []
    if isinstance(site, ExpertsSite):
        steps: list[tuple[Any, tuple[Any, ...]]] = [(ATEN.view.default, ([count, -1, size],))]
        if site.in_out:
            steps.append((ATEN.transpose.int, (1, 2)))
        if site.place:
            order = [1, 2]
            order.insert(site.place, 0)
            steps.append((ATEN.permute.default, (order,)))
        return steps
    if not isinstance(site, ConvSite):
        return []
    if not site.transposed:
        return [(ATEN.view.default, ([count * out, -1, *site.kernel],))]
    return [
        (ATEN.view.default, ([count, out, -1, *site.kernel],)),
        (ATEN.transpose.int, (1, 2)),
        (ATEN.reshape.default, ([site.channels[0], out, *site.kernel],)),
    ]


def read_value(edit: Attaching, site: WeightSite) -> None:
    """Lets the calls of a site whose operator reads stored parts read the dense value instead."""
    graph = edit.graph_module.graph
    calls = [edit.node(name) for name in site.nodes]
    read = [(call, p) for call in calls if (p := WeightedCall.of(call)) is not None]
    own = [(call, parts, parts.stored) for call, parts in read if parts.stored is not None]
    weight = edit.weight(site)
    for call, parts, stored in own:
        with graph.inserting_before(call):
            dense = dense_value(graph, site, stored, weight, call)
            if isinstance(site, LinearSite):
                new = linear_call(graph, parts.x, dense, parts.bias, site.in_out)
            else:
                new = _lookup(graph, parts.x, dense, weight)
        replace_call(graph, call, new)
    edit.refresh()


def _lookup(graph: Graph, ids: Node, table: Node, weight: Weight) -> Node:
    shape = weight.shape
    if not isinstance(shape, EmbeddingShape):
        raise PassError(f"{weight.name} is no table.")
    if shape.wraps:
        return graph.call_function(ATEN.index.Tensor, (table, [ids]))
    padding = -1 if shape.padding is None else shape.padding
    return graph.call_function(EMBEDDING, (table, ids, padding))


def read_parts(edit: Attaching, site: WeightSite) -> list[Node]:
    """Lets the calls of a site read the parts of its stored weight where an operator does that and
    nothing stands between; returns the calls."""
    graph = edit.graph_module.graph
    for name in site.nodes:
        call = edit.node(name)
        parts = WeightedCall.of(call)
        dense = None if parts is None or parts.stored else _bare(parts.weight)
        if parts is None or dense is None:
            continue
        with graph.inserting_before(call):
            new = _over_parts(graph, site, call, parts, dense)
        if new is None:
            continue
        replace_call(graph, call, new)
        _erase(graph, parts.weight)
    edit.refresh()
    return [edit.node(name) for name in site.nodes]


def _bare(weight: Any) -> Unpacked | None:
    """The stored matrix that a call multiplies by, without expressions."""
    node = weight
    while isinstance(node, Node) and dense_of(node) is None:
        node = node.args[0] if is_op(node, ATEN.t.default) else None
    return Unpacked.below(node)


def _over_parts(
    graph: Graph, site: WeightSite, call: Node, parts: WeightedCall, dense: Unpacked
) -> Node | None:
    """A new call over stored parts; None where there is no operator for that."""
    given = dense.operator, dense.parts, dense.numbers
    if isinstance(site, LinearSite) and linear_parts(call) is not None:
        return StoredCall(*given, parts.x, parts.bias).create(graph)
    if not isinstance(site, EmbeddingSite):
        return None
    padding = None if is_op(call, INDEX) else named_arguments(call).get("padding_idx", -1)
    operator, args = Stored(*given).lookup(parts.x, dense.size, padding, value(call).dtype)
    return graph.call_function(operator, args)


def replace_call(graph: Graph, call: Node, new: Node) -> None:
    """Puts a call in the place of one that computes the same."""
    new.meta = {**call.meta, "call": call.meta.get("call", call.name)}
    call.replace_all_uses_with(new)
    graph.erase_node(call)
    new.name = new.meta["call"]  # sites name it so, also in files
