"""Composing the branches of one call of a weight: always emitted in one fixed order.

Input scale, base (its weight maybe an expression), row scale, deltas (or what combines them),
output scale: so the order of passes does not change the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ...branches.branch import Delta, RowScale, Scale
from ...errors import PassError
from ...graph.aten import (
    ATEN,
    LINEAR,
    VIEWS,
    data_index,
    strip,
    users,
    value,
)  # fmt: skip
from ...graph.flow import site_nodes
from ...graph.quantised_call import QuantisedCall
from ...graph.weighted_call import WeightedCall
from ...program.history import Attachment
from ...program.sites import LinearSite, WeightSite
from ...program.state import State

ORDER = {"input_scale": 0, "row_scale": 1, "delta": 2, "combine": 3, "output_scale": 4}


def at_weight(
    program: State, weight: str, first: frozenset[str] = frozenset(), call: str = ""
) -> list[Attachment]:
    """The branches of all sites of one weight, in the fixed order of composition.

    Of the same slot, those with a path in `first` come innermost (sums and products commute). With
    `call`, only the sites that this call computes: another one may read the weight transposed.
    """
    ids = {
        s.id for s in program.sites
        if isinstance(s, WeightSite) and s.weight == weight and (not call or call in s.nodes)
    }  # fmt: skip
    found = [a for a in program.attachments if a.site in ids and a.slot in ORDER]
    return sorted(found, key=lambda a: (ORDER[a.slot], a.path not in first, a.adapter, a.site))


def adapted_weight(program: State, site: LinearSite, scales: bool = True) -> Tensor:
    """What the linear of a site multiplies by with all its branches, `[out, in]`.

    The whole of a fused weight; without `scales`, only what is added to it. Branches that read
    values of the graph do not count.
    """
    weight = program.module.get_parameter(site.weight).detach()
    dense = weight.T if site.in_out else weight
    attached = [a for a in at_weight(program, site.weight) if not a.reads]
    order = ("row_scale", "delta", "input_scale", "output_scale")
    for attachment in sorted(attached, key=lambda a: order.index(a.slot)):
        branch = program.branch(attachment)
        if isinstance(branch, Delta | RowScale):
            dense = dense + branch.full_delta().detach()
        if isinstance(branch, RowScale) and scales:
            dense = dense * branch.full_rows(weight).detach()[:, None]
        elif isinstance(branch, Scale) and scales:
            scale = branch.full_scale().detach()
            dense = dense * (scale if attachment.slot == "input_scale" else scale[:, None])
    return dense


def compose(program: State, call: Node, weight: str, first: frozenset[str] = frozenset()) -> None:
    """Emits all branches of one linear call afresh, in the fixed order."""
    gm = program.module
    call = _raise(gm, call)
    key: str = call.meta.get("call") or call.name
    _decompose(gm, call, key)
    mine = at_weight(program, weight, first, key)

    def of_slot(kind: str) -> list[Attachment]:
        return [a for a in mine if a.slot == kind]

    def emit(kind: str, target: str | Callable[..., Tensor], args: tuple[object, ...], name: str):
        node = gm.graph.create_node(kind, target, args, {}, name=name)  # pyright: ignore[reportArgumentType]
        node.meta["composed"] = key
        inside.add(node)
        return node

    def branch(attachment: Attachment, args: tuple[object, ...]) -> Node:
        node = emit("call_module", attachment.path, args, attachment.path.replace(".", "_"))
        reads = {name: nodes[read] for name, read in attachment.reads.items()}
        node.kwargs = {**reads, **parts.operands}
        return node

    def dense(site: Any, integers: QuantisedCall) -> Node:
        """The dense weight of a quantised call, stored as the model's own was."""
        operator, args = integers.dense(site.in_features)
        with gm.graph.inserting_after(call):
            made = emit("call_function", operator, args, "dequantise")
        with gm.graph.inserting_after(made):
            made = emit("call_function", ATEN.to.dtype, (made, value(call).dtype), "dense")
        if not site.in_out:
            return made
        with gm.graph.inserting_after(made):
            return emit("call_function", ATEN.t.default, (made,), "dense_t")

    inside: set[Node] = set()
    nodes = site_nodes(gm) if any(a.reads for a in mine) else {}
    data = data_index(call)
    parts = WeightedCall.of(call)
    if parts is None:
        if mine:
            raise PassError(f"{mine[0].site}: {call.name} multiplies by no weight.")
        return
    x = parts.x
    with gm.graph.inserting_before(call):
        for attachment in of_slot("input_scale"):
            x = branch(attachment, (x,))
    if x is not parts.x:
        call.update_arg(data, x)
    tail = call
    readers = users(call)
    for attachment in of_slot("row_scale"):
        stored, bias = parts.weight, parts.bias
        integers = QuantisedCall.of(call)
        if integers is not None:
            stored = dense(program.sites[attachment.site], integers)
        else:
            stored = strip(stored, VIEWS)
        with gm.graph.inserting_after(tail if integers is None else stored):
            tail = branch(attachment, (tail, x, stored, bias))
    updates: dict[str, Node] = {}
    last, members = tail, {path for a in mine for path in a.members}
    for attachment in (*of_slot("delta"), *of_slot("combine")):
        with gm.graph.inserting_after(last):
            last = branch(attachment, (x, *(updates[path] for path in attachment.members)))
        if attachment.path in members:
            updates[attachment.path] = last
            continue
        with gm.graph.inserting_after(last):
            name = attachment.path.replace(".", "_") + "_add"
            last = tail = emit("call_function", ATEN.add.Tensor, (tail, last), name)
    for attachment in of_slot("output_scale"):
        with gm.graph.inserting_after(tail):
            tail = branch(attachment, (tail,))
    if tail is not call:
        tail.meta["instead"] = value(call)
        for reader in [*readers, *(u for u in call.users if u not in readers)]:
            if reader not in inside:
                reader.replace_input_with(call, tail)


def _raise(gm: GraphModule, call: Node) -> Node:
    """Turns a lowered call back into the bare linear it stands for."""
    if call.op != "call_module":
        return call
    with gm.graph.inserting_before(call):
        name = str(call.meta.get("call", call.name))
        linear = gm.graph.create_node("call_function", LINEAR, call.args[-3:], {}, name=name)
    linear.meta.update({k: v for k, v in call.meta.items() if k != "composed"})
    call.replace_all_uses_with(linear)
    gm.graph.erase_node(call)
    return linear


def composed_value(call: Node) -> Node:
    """The value of a linear call with all branches composed around it; other nodes themselves."""
    mine = _composed(call, call.meta.get("call", call.name))
    inside = {*mine, call}
    return next((n for n in mine if any(u not in inside for u in n.users)), call)


def _decompose(gm: GraphModule, call: Node, key: str) -> None:
    """Removes the composed branches around a call, leaving the bare linear."""
    mine = _composed(call, key)
    if not mine:
        return
    inside = {*mine, call}
    tail = composed_value(call)
    data = data_index(call)
    x = call.args[data]
    while isinstance(x, Node) and x in inside:
        x = x.args[0]
    call.update_arg(data, x)
    if tail is not call:
        for reader in [u for u in tail.users if u not in inside]:
            reader.replace_input_with(tail, call)
    while mine:
        unread = next(n for n in mine if not n.users)
        gm.graph.erase_node(unread)
        mine.remove(unread)


def _composed(call: Node, key: str) -> list[Node]:
    """The nodes emitted around a call, found from it (a scan of the graph for every call would
    be quadratic)."""
    found: dict[Node, None] = {}
    stack = [call]
    while stack:
        node = stack.pop()
        for near in (*node.all_input_nodes, *node.users):
            if near.meta.get("composed") == key and near not in found:
                found[near] = None
                stack.append(near)
    return list(found)


def fold_ready(program: State, first: frozenset[str] = frozenset()) -> None:
    """Re-emits every composed call in its plain, unlowered form, `first` innermost."""
    attached = {a.site for a in program.attachments if a.slot in ORDER}
    weights = {s.weight for s in program.sites if isinstance(s, WeightSite) and s.id in attached}
    nodes = site_nodes(program.module)
    done: set[str] = set()
    for site in program.sites:
        if isinstance(site, WeightSite) and site.weight in weights and not site.obstacle:
            for name in site.nodes:
                if name not in done:
                    compose(program, nodes[name], site.weight, first)
                    done.add(name)
