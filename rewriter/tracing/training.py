"""Regions that run in training only, found by comparing the training graph with the other one.

Dropout and batch norm have modules of their own (`modes`). Anything else that a forward does under
`if self.training` (stochastic depth, label dropout, noise) is found by aligning both graphs
node by node; where they part, the training graph's region moves into a `TrainingOnly`.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..errors import CaptureError
from ..graph.aten import (
    ATEN,
    attribute,
    erase_dead,
    is_op,
    output_node,
    overloads,
    set_attribute,
    source_line,
    submodule,
    updates_stored,
    written,
)  # fmt: skip
from ..graph.modes import MODES, TrainingOnly, Update

_COPIES = overloads("copy_")
_SAME = overloads("detach", "alias")
_HANDLED = frozenset({torch.Tag.nondeterministic_seeded})


def draws(gm: GraphModule) -> bool:
    """Whether the graph draws random numbers other than through a mode's module."""
    return any(
        n.op == "call_function" and not _HANDLED.isdisjoint(getattr(n.target, "tags", ()))
        for n in gm.graph.nodes
    )


def writes(gm: GraphModule) -> bool:
    """Whether the graph writes stored tensors other than through a mode's module."""
    return any(updates_stored(node) for node in gm.graph.nodes)


class _Alignment:
    """Pairs of nodes of the two graphs that do the same at the same line, in the same order.

    Attributes:
        partner: evaluation node -> training node.
        taken: training nodes that have a partner.
    """

    def __init__(self, training: GraphModule, evaluation: GraphModule) -> None:
        self.gm, self.other = training, evaluation
        ours, theirs = list(training.graph.nodes), list(evaluation.graph.nodes)
        keys = [[_key(gm, n) for n in gm.graph.nodes] for gm in (training, evaluation)]
        blocks = SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks()
        self.partner: dict[Node, Node] = {}
        for i, j, size in blocks:
            self.partner.update(zip(theirs[j : j + size], ours[i : i + size], strict=True))
        self.taken = set(self.partner.values())

    def parted(self) -> list[tuple[Node, Node, Node]]:
        """(training user, its training input, the evaluation input at the same place)."""
        return [
            (a, x, y)
            for b, a in self.partner.items()
            for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=True)
            if not self._same(x, y)
        ]

    def _same(self, x: Node, y: Node) -> bool:
        """Whether `x` is `y`'s partner, up to what does nothing in evaluation."""
        while self.partner.get(y) is not x and isinstance(
            submodule(self.gm, x), nn.Dropout | Update
        ):
            x = x.all_input_nodes[0]
        return self.partner.get(y) is x


def _key(gm: GraphModule, node: Node) -> tuple[str, ...]:
    module = submodule(gm, node)
    what = str(node.target) if module is None else type(module).__name__
    arguments: Any = map_arg((node.args, node.kwargs), lambda n: "?")
    constants = "" if node.op == "output" else str(arguments)
    return node.op, what, source_line(node), constants, str(len(node.all_input_nodes))


def part_modes(training: GraphModule, evaluation: GraphModule) -> int:
    """Edits `training` so that it follows `.training` everywhere.

    Args:
        training: canonical graph, exported in training mode, with its modes restored.
        evaluation: the same, exported in evaluation mode.

    Returns:
        The number of regions that run in training only.

    Raises:
        CaptureError: the two modes return different things, or what evaluation computes cannot
            be expressed in the training graph.
    """
    alignment = _Alignment(training, evaluation)
    if output_node(evaluation) not in alignment.partner:
        raise CaptureError(
            "the forward returns another number of tensors in training than in evaluation. Wrap "
            "the model so that both return the same."
        )
    _gate_updates(alignment)
    parted = alignment.parted()
    for index, (user, a, b) in enumerate(parted):
        _insert(alignment, index, user, a, b)
    erase_dead(training)
    training.recompile()
    return len(parted)


def _gate_updates(at: _Alignment) -> None:
    """Makes writes of stored tensors that evaluation does not do follow the mode."""
    gm = at.gm
    writes = [n for n in gm.graph.nodes if updates_stored(n) and n not in at.taken]
    for index, node in enumerate(writes):
        path = f"{MODES}.update_{index}"
        gm.add_submodule(path, Update())
        with gm.graph.inserting_before(node):
            args = _written_whole(gm, node)
            new = gm.graph.create_node("call_module", path, args, name=f"update_{index}")
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        at.taken.add(new)  # regions read its result; they do not run it again


def _written_whole(gm: GraphModule, node: Node) -> tuple[Any, Any]:
    """The stored tensor that an in-place operation writes all of, and what it writes.

    Raises:
        CaptureError: it writes a part, or the operation has no form that is not in place.
    """
    target, state = node.args[0], written(node)
    while is_op(target, _SAME) and isinstance(target, Node):
        target = target.args[0]
    if target is state and state is not None and is_op(node, _COPIES):
        return state, node.args[1]
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    packet = getattr(ATEN, name.removesuffix("_"), None)
    form = getattr(packet, overload, None)
    if target is not state or form is None or "out" in overload:
        raise CaptureError(
            f"{node.name} ({source_line(node)}) writes a stored tensor in training only, in a way "
            "that has no counterpart here. Write it with buffer.copy_(value)."
        )
    fresh = gm.graph.call_function(form, node.args, dict(node.kwargs))
    fresh.meta.update(node.meta)
    return state, fresh


def _insert(at: _Alignment, index: int, user: Node, a: Node, b: Node) -> None:
    gm = at.gm
    region = list(_region(a, at.taken))
    outer = {u for n in region if n is not a for u in n.users} - set(region)
    region = [a] if outer else region
    operands = list(dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in region))
    module = TrainingOnly(_outlined(gm, region, operands, a)) if not outer else TrainingOnly(None)
    path = f"{MODES}.training_{index}"
    gm.add_submodule(path, module)
    with gm.graph.inserting_before(user):
        evaluated = _copied(at, b)
        args = (evaluated, a) if outer else (evaluated, *operands)
        new = gm.graph.create_node("call_module", path, args, {}, name=f"training_{index}")
    new.meta.update(a.meta)
    user.replace_input_with(a, new)


def _region(end: Node, boundary: set[Node]) -> Iterator[Node]:
    """What only `end` needs, from the nodes that both graphs have up to it, in graph order."""
    inside: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in inside or node in boundary or node.op in ("placeholder", "get_attr"):
            continue
        inside.add(node)
        stack.extend(node.all_input_nodes)
    yield from (n for n in end.graph.nodes if n in inside)


def _outlined(gm: GraphModule, region: list[Node], operands: list[Node], end: Node) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {n: graph.placeholder(f"x{i}") for i, n in enumerate(operands)}
    for node in region:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[end])
    root = nn.Module()
    for node in region:
        if node.op == "call_module":
            root.add_module(str(node.target).replace(".", "_"), gm.get_submodule(str(node.target)))
            copies[node].target = str(node.target).replace(".", "_")
    return GraphModule(root, graph)


def _copied(at: _Alignment, node: Node) -> Node:
    """The training graph's counterpart of an evaluation node, copied if it has none."""
    if node in at.partner:
        return at.partner[node]
    if node.op == "get_attr":
        item = attribute(at.other, str(node.target))
        set_attribute(at.gm, str(node.target), item)
    elif node.op != "call_function":
        raise CaptureError(
            f"{node.name} ({source_line(node) or node.target}) runs in evaluation only. Compute "
            "it in both modes and choose the result."
        )
    operands = {n: _copied(at, n) for n in node.all_input_nodes}
    at.partner[node] = at.gm.graph.node_copy(node, lambda n: operands[n])
    return at.partner[node]
