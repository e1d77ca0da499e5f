"""What branches read, where that depends on stored tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..graph.aten import ancestors, placeholders
from ..graph.module import device_of
from ..graph.sharded import Gathering
from ..program.history import Attachment
from ..program.state import State
from .still import still


def constant_reads(
    program: State, attachments: Iterable[Attachment], inputs: Mapping[str, int] | None = None
) -> dict[str, dict[str, Tensor]]:
    """The reads of some branches that depend on stored tensors and the given inputs alone.

    Args:
        program: not changed.
        attachments: the branches.
        inputs: name of an input -> the number that fills it.

    Returns:
        path of the branch -> {argument: value}, as evaluation mode computes it; without values
        that have no storage (of a program on the meta device).
    """
    wanted = [a for a in attachments if a.reads]
    if not wanted:
        return {}
    gm = still(program)
    run = Gathering(gm, garbage_collect_values=False)
    for name, number in (inputs or {}).items():
        filled = torch.full_like(program.sample[name], number, device=device_of(gm))
        run.env[placeholders(gm)[name]] = filled
    nodes: dict[str, Node] = {}
    varying: set[Node] = set()
    for node in gm.graph.nodes:
        nodes[node.name] = node
        given = node.op != "placeholder" or node in run.env
        if not given or _draws(node) or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    order = {node: place for place, node in enumerate(nodes.values())}
    constants: dict[str, dict[str, Tensor]] = {}
    copies: dict[Node, Tensor] = {}
    with torch.no_grad():
        for attachment in wanted:
            for argument, name in attachment.reads.items():
                read = nodes[name]
                if read in varying:
                    continue
                for node in sorted(ancestors(read), key=order.__getitem__):
                    if node not in run.env:
                        run.env[node] = run.run_node(node)
                value = run.env[read]
                if isinstance(value, Tensor) and not value.is_meta:
                    own = copies.setdefault(read, value.detach().clone())
                    constants.setdefault(attachment.path, {})[argument] = own
    return constants


def _draws(node: Node) -> bool:
    """Whether an operator draws random numbers."""
    operator = node.target
    return isinstance(operator, OpOverload) and torch.Tag.nondeterministic_seeded in operator.tags
