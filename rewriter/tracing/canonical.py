"""The canonical form of a captured graph: no asserts, no no-op casts or slices, one node a tensor.

Exported graphs route the residual stream through no-op casts, hide code in no-grad regions and
name one tied tensor several times. All of it hides dataflow, so it goes before anything looks.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import CaptureError
from ..graph.aten import (
    ATEN,
    CASTS,
    attribute,
    erase_dead,
    is_float,
    is_op,
    named_arguments,
    overloads,
    value,
)

_SLICE = ATEN.slice.Tensor
_CLONES = overloads("clone", "lift_fresh_copy")
_END = 2**63 - 1


def _inline_grad_region(gm: GraphModule, node: Node) -> None:
    enabled, region_node, *operands = node.args
    region: Any = gm.get_submodule(str(region_node.target))  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    env: dict[Node, Any] = {}
    sources = [n for n in region.graph.nodes if n.op == "placeholder"]
    env.update(zip(sources, operands, strict=True))
    results: list[Any] = []
    with gm.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                results = [env[o] for o in inner.args[0]]
                break
            env[inner] = gm.graph.node_copy(inner, lambda n: env[n])
        if enabled is False:
            # Keep the no-grad meaning only where a gradient could flow.
            for index, result in enumerate(results):
                if is_float(result):
                    detached = gm.graph.call_function(ATEN.detach.default, (result,))
                    detached.meta.update(result.meta)
                    results[index] = detached
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"unexpected use of a no-grad region by {user.format_node()}")
        user.replace_all_uses_with(results[user.args[1]])  # pyright: ignore[reportArgumentType, reportCallIssue]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _is_noop(node: Node) -> bool:
    if is_op(node, _SLICE):
        begin, end, step = (*node.args[2:], None, None, None)[:3]
        return begin in (0, None) and end in (_END, None) and step in (1, None) and (
            len(node.args) > 2
        )  # fmt: skip
    if is_op(node, CASTS) and node.target not in overloads("_to_copy"):
        before, after = value(node.args[0]), value(node)
        return (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
            and not named_arguments(node).get("copy")
        )
    return False


def _is_neutral(node: Node) -> bool:
    """Whether a node adds integer 0 or multiplies by 1, which changes no bit."""
    if not (is_op(node, ATEN.add.Tensor) or is_op(node, ATEN.mul.Tensor)) or node.kwargs:
        return False
    x, other = node.args[0], node.args[1]
    before, after = value(x), value(node)
    if type(other) not in (int, float) or not isinstance(before, Tensor):
        return False
    if not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    if is_op(node, ATEN.mul.Tensor):
        return bool(other == 1)
    return bool(other == 0) and not before.is_floating_point()


def _merge_tied(gm: GraphModule, aliases: Mapping[str, str]) -> None:
    first: dict[int, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = attribute(gm, str(node.target))
        if not isinstance(tensor, Tensor):
            continue
        canonical = aliases.get(str(node.target), str(node.target))
        if id(tensor) in first:
            node.replace_all_uses_with(first[id(tensor)])
            gm.graph.erase_node(node)
        else:
            node.target = canonical
            first[id(tensor)] = node


def canonicalize(gm: GraphModule, aliases: Mapping[str, str]) -> None:
    """Edits `gm` in place; outputs stay bit-equal.

    Args:
        gm: the module of an exported program, with original parameter names.
        aliases: tied names to the first name of their tensor.
    """
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name == "wrap_with_set_grad_enabled":
            _inline_grad_region(gm, node)
    for node in list(gm.graph.nodes):
        if (
            (node.op == "call_module" and str(node.target) == "_guards_fn")
            or is_op(node, ATEN._assert_tensor_metadata.default)
            or (isinstance(node.target, torch._ops.OpOverload) and "assert" in str(node.target))
        ):
            gm.graph.erase_node(node)
        elif _is_noop(node) or _is_neutral(node):
            node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]
            gm.graph.erase_node(node)
    _merge_tied(gm, aliases)
    erase_dead(gm)
