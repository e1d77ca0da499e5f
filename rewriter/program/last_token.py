"""A program's module that computes its head at the last token alone, as decoding needs it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..branches.branch import Delta, Scale
from ..graph.aten import ATEN, output_node, shape, submodule
from ..graph.module import CapturedModule, sharing_module, state_tensors
from ..graph.sharded import has_shards
from ..graph.weighted_call import WeightedCall

LINEAR = ATEN.linear.default


def at_last_token(gm: CapturedModule, leaf: int) -> nn.Module:
    """The module with one token in its output number `leaf`, `[batch, 1, vocabulary]`; itself where
    something else needs what that is computed from, or mixes tokens there.

    Args:
        gm: in evaluation mode; its tensors are shared. Outputs other than `leaf` are of no use.
        leaf: the number of an output `[batch, sequence, vocabulary]`.
    """
    plain = type(gm).__bases__ == (CapturedModule,) and gm._compiled_call_impl is None
    watched = any(m._forward_hooks or m._forward_pre_hooks for m in gm.modules())
    if not plain or watched or state_tensors(gm) or has_shards(gm):
        return gm
    outputs: Any = output_node(gm).args[0]
    head = _head(gm, outputs[leaf]) if isinstance(outputs[leaf], Node) else None
    if head is None:
        return gm
    sharing = sharing_module(gm, gm.graph, type(gm).__name__)
    nodes = {n.name: n for n in sharing.graph.nodes}
    inside, sources = ({nodes[n.name] for n in each} for each in head)
    for source in sources:
        with sharing.graph.inserting_after(source):
            last = sharing.graph.call_function(ATEN.slice.Tensor, (source, 1, -1, sys.maxsize))
        for reader in inside:
            reader.replace_input_with(source, last)
    sharing.recompile()
    return sharing


def _head(gm: CapturedModule, logits: Node) -> tuple[set[Node], set[Node]] | None:
    """The nodes from the first product up to the logits, and what they read token by token."""
    end, inside, sources = output_node(gm), set[Node](), set[Node]()
    stack = [logits]
    while stack:
        node = stack.pop()
        if node in inside:
            continue
        inside.add(node)
        read = _read(gm, node)
        if read is None:
            return None
        before, behind = read
        sources.update(before)
        stack += behind
    alone = all(set(n.users) <= inside for n in inside - {logits}) and set(logits.users) == {end}
    tokens = [str(s) for s in (shape(logits) or ())[:2]]
    fitting = [len(s) == 3 and [str(n) for n in s[:2]] == tokens for s in map(_sizes, sources)]
    return (inside, sources) if alone and sources and all(fitting) else None


def _read(gm: CapturedModule, node: Node) -> tuple[list[Node], list[Node]] | None:
    """What a node reads in front of the head, and of the head; None if it may mix tokens."""
    module = submodule(gm, node)
    operands = node.all_input_nodes
    if isinstance(module, Delta | Scale):
        if len(operands) != 1 or len(node.args) != 1:
            return None
        return (operands, []) if isinstance(module, Delta) else ([], operands)
    if node.target is LINEAR:
        parts = WeightedCall.of(node)
        return ([parts.x], []) if parts is not None and isinstance(parts.x, Node) else None
    if node.op != "call_function" or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        casts = node.target in (ATEN.to.dtype, ATEN._to_copy.default)
        return ([], operands) if casts else None
    values = [n for n in operands if n.op != "get_attr" or len(_sizes(n)) > 1]
    return [], values


def _sizes(node: Node) -> tuple[Any, ...]:
    return shape(node) or ()
