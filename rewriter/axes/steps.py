"""What each node of a graph says of the named axes around it."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ..branches.branch import Branch
from ..branches.prompts import KeyValue
from ..branches.routing import Inserted
from ..graph.aten import NORMS, is_op, named_arguments, overloads, submodule
from ..graph.modes import Attention, BatchNorm
from .operators import operator_steps
from .relation import Grid, Tie, aligned, extent, owner, sizes_of, tensors, tie, without
from .step import Made, Product, Row, Same, Step, like, made, repeated, same
from .ties import GETITEM, relations
from .views import DIVISIONS

_BAGS = overloads("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
_SELECTIONS = overloads("topk", "sort", "max", "min", "median")


def steps(gm: GraphModule, node: Node) -> list[Step]:
    """What one node says of the axes around it."""
    order: list[Step] = []
    for relation in relations(gm, node):
        if isinstance(relation, Grid):
            parts = tuple((r, extent(s)) for r, s in relation.parts)
            order.append(Product(relation.merged, parts))
        elif isinstance(relation, Tie) and relation.index is None:
            order.append(Same(relation.a, relation.b))
    module = submodule(gm, node)
    if isinstance(module, Attention):
        return [*order, *_attention(node)]
    if module is not None:
        return [*order, *_module(node, module)]
    return [*order, *(_entry(gm, node) if is_op(node, GETITEM) else operator_steps(node))]


def _attention(node: Node) -> list[Step]:
    """Queries and keys are compared over a width, keys and values lie along the same tokens."""
    q, k, v = tensors(node.args[:3])
    order = same([tie(q, -2, node, -2), tie(k, -2, v, -2), tie(q, -1, k, -1)])
    for mask in tensors(node.args[3:4]):
        order += same([*aligned(mask, -2, q, -2)] if sizes_of(mask)[-2:-1] else [])
        order += same([*aligned(mask, -1, k, -2)])
    if len(sizes_of(q)) < 4:
        return order
    heads, groups = sizes_of(q)[1], sizes_of(k)[1]
    if isinstance(heads, int) and isinstance(groups, int) and 1 < groups < heads:
        order.append(repeated(k, -3, q, -3, heads // groups))
    return order


def _module(node: Node, module: Any) -> list[Step]:
    if isinstance(module, KeyValue):
        return []
    first = next(iter(tensors(node.args)), None)
    if isinstance(module, Branch) and not module.reads and first is not None:
        rank = min(len(sizes_of(first)), len(sizes_of(node)))
        return [s for k in range(-rank, 0) for s in same(aligned(first, k, node, k))]
    if first is None or not (isinstance(module, BatchNorm) or getattr(module, "keeps_axes", False)):
        return []
    back = like(node, first)
    return [*like(first, node), *(step for step in back if isinstance(step, Made))]


def _entry(gm: GraphModule, node: Node) -> list[Step]:
    """An entry of what an operator or a branch returns."""
    source: Any = node.args[0]
    number: Any = node.args[1]
    module = submodule(gm, source)
    if isinstance(module, KeyValue) and isinstance(number, int) and number < 2:
        return like(source.args[number], node)
    if isinstance(module, Inserted) and number == 0:
        return like(source.args[0], node)
    if is_op(source, _SELECTIONS):
        return _selection(source, node)
    if is_op(source, NORMS) and number == 0:
        return like(source.args[0], node)
    if is_op(source, _BAGS) and number == 0:
        table, _, starts = tensors(source.args[:3])
        return same([*aligned(starts, 0, node, 0), *aligned(table, 1, node, 1)])
    if not is_op(source, DIVISIONS) or is_op(source, overloads("unbind")):
        return []
    whole: Any = source.args[0]
    axis = int(named_arguments(source).get("dim", 0)) % len(sizes_of(node))
    shapes = [tuple(v.shape) for v in source.meta.get("val") or ()]
    before = [s[axis] for s in shapes[:number]]
    start = sum(before) if all(isinstance(s, int) for s in before) else None
    order: list[Step] = [
        s for k in range(len(sizes_of(node))) if k != axis
        for s in same(aligned(whole, k, node, k))
    ]  # fmt: skip
    order.append(made(whole, axis, node, axis, start))
    entries = {u.args[1]: u for u in source.users if is_op(u, GETITEM)}
    if number == 0 and len(entries) == len(shapes):
        refs = tuple((entries[k], axis) for k in range(len(shapes)))
        order.append(Row((owner(whole), axis), extent(sizes_of(whole)[axis]), refs))
    return order


def _selection(call: Node, node: Node) -> list[Step]:
    source: Any = call.args[0]
    given = named_arguments(call)
    axis = int(given.get("dim", -1)) % len(sizes_of(source))
    if len(sizes_of(node)) < len(sizes_of(source)):
        return same(without(source, node, {axis}, keep=False))
    return [*same(without(source, node, {axis}, keep=True)), made(source, axis, node, axis)]
