"""Values of the graph that branches may read beside their own operand.

A method holds them as opaque handles: what enters a site, which tokens are real, a module that is
evaluated once a forward and feeds many sites.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.aten import inputs
from ...graph.weighted_call import WeightedCall, data_of
from ...program.sites import Site, SublayerSite, WeightSite
from .call import Value


def input_of(site: Site, nodes: Mapping[str, Node]) -> Value:
    """What enters a site: the operand of its calls, or the residual that a sublayer adds to."""
    node = nodes[site.nodes[0]]
    if isinstance(site, WeightSite):
        parts = WeightedCall.of(node)
        operand = data_of(node) if parts is None else parts.x
        while isinstance(operand, Node) and operand.meta.get("composed") == _key(node):
            operand = operand.args[0]  # before the input scales of this linear
    elif isinstance(site, SublayerSite):
        add = nodes[site.nodes[1]]
        operand = next((a for a in add.args[:2] if a is not node), None)
    else:
        operand = inputs(node)[0]
    if not isinstance(operand, Node):
        raise PassError(f"{site.id} has no input that a branch could read.")
    return operand


def _key(call: Node) -> str:
    return str(call.meta.get("call", call.name))


def item_of(gm: GraphModule, source: Value, key: str | int) -> Value:
    """One entry of a shared module's output; one node however often it is asked for."""
    items = [u for u in source.users if u.target is operator.getitem]
    for item in items:
        if item.args[1] == key:
            return item
    name = f"{source.name}_{str(key).replace('.', '_')}"
    with gm.graph.inserting_after(items[-1] if items else source):
        return gm.graph.create_node("call_function", operator.getitem, (source, key), {}, name=name)


def unshared(gm: GraphModule, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Deletes the shared modules that nothing calls any more; the paths of the others."""
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for path in paths:
        if path not in called:
            gm.delete_submodule(path)
    return tuple(p for p in paths if p in called)
