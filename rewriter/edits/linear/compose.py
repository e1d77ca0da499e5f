"""Composing the branches of one call of a weight: always emitted in one fixed order.

Input shift, input scale, input map, base (its weight maybe an expression), row scale, deltas (or
what combines them), output scale: so the order of passes does not change the graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ...branches.branch import Delta, RowScale, Scale
from ...branches.input_map import InputMap
from ...errors import PassError
from ...graph.aten import (
    ATEN,
    LINEAR,
    VIEWS,
    alike,
    outdate,
    strip,
    value,
)  # fmt: skip
from ...graph.flow import site_nodes
from ...graph.stored_call import Stored
from ...graph.weighted_call import WeightedCall, redirect
from ...program.history import Attachment
from ...program.sites import LinearSite, WeightSite
from ...program.state import State
from ...weights.weight import Weight, columns_of

ORDER = {
    name: place
    for place, name in enumerate(
        (
            "input_shift",
            "input_scale",
            "input_map",
            "row_scale",
            "delta",
            "combine",
            "output_scale",
            "output_shift",
        )
    )
}


def at_weight(
    program: State, weight: str, first: frozenset[str] = frozenset(), call: str = ""
) -> list[Attachment]:
    """The branches of all sites of one weight, in the fixed order of composition.

    Of the same slot, those with a path in `first` come innermost (sums and products commute). With
    `call`, only the sites that this call computes: another one may read the weight transposed.
    """
    sites = [s.id for s in program.sites.by_weight.get(weight, ()) if not call or call in s.nodes]
    attachments = [a for site in sites for a in program.attached(site) if a.slot in ORDER]
    return sorted(
        attachments, key=lambda a: (ORDER[a.slot], a.path not in first, a.adapter, a.site)
    )


def adapted_weight(program: State, site: LinearSite, weight: Weight, scales: bool = True) -> Tensor:
    """What the linear of a site multiplies by with all its branches, `[out, in]`.

    The whole of a fused weight; without `scales`, only what is added to it. Branches that read
    values of the graph do not count.
    """
    dense = weight.dense()
    stored = weight.shape.stored(dense)
    attached = [a for a in at_weight(program, site.weight, call=site.nodes[0]) if not a.reads]
    order = ("row_scale", "delta", "input_map", "input_scale", "output_scale")
    for attachment in sorted(attached, key=lambda a: order.index(a.slot)):
        branch = program.branch(attachment)
        if isinstance(branch, Delta | RowScale):
            dense = dense + branch.full_delta().detach()
        if isinstance(branch, RowScale) and scales:
            dense = dense * branch.full_rows(stored).detach()[:, None]
        elif isinstance(branch, InputMap) and scales:
            dense = branch.full_adjoint(dense).detach()
        elif isinstance(branch, Scale) and scales:
            scale = branch.full_scale().detach()
            dense = dense * (scale if attachment.slot == "input_scale" else scale[:, None])
    return dense


def compose(program: State, call: Node, weight: str, first: frozenset[str] = frozenset()) -> None:
    """Brings the branches of one linear call into the fixed order, and adds those that are new."""
    call = _raise(program.module, call)
    mine = at_weight(program, weight, first, call.meta.get("call") or call.name)
    chain = _Chain(program, call)

    def of_slot(kind: str) -> list[Attachment]:
        return [a for a in mine if a.slot == kind]

    parts = chain.parts
    if parts is None:
        if mine:
            raise PassError(f"{mine[0].site}: {call.name} multiplies by no weight.")
        return
    x = chain.source(parts.x)
    for attachment in (*of_slot("input_shift"), *of_slot("input_scale"), *of_slot("input_map")):
        x = chain.branch(attachment, (x,), before=call, instead=x)
    if x is not parts.x:
        redirect(call, x)
    tail = call
    for attachment in of_slot("row_scale"):
        stored, place = strip(parts.weight, VIEWS), tail
        if parts.stored is not None:
            place = stored = chain.dense(parts.stored, program.sites[attachment.site])
        operands = (tail, x, stored, parts.bias)
        tail = chain.branch(attachment, operands, behind=place, instead=tail)
    updates: dict[str, Node] = {}
    last, members = tail, {path for a in mine for path in a.members}
    for attachment in (*of_slot("delta"), *of_slot("combine")):
        last = chain.branch(
            attachment, (x, *(updates[path] for path in attachment.members)), behind=last
        )
        if attachment.path in members:
            updates[attachment.path] = last
            continue
        last = tail = chain.add(tail, last)
    for attachment in (*of_slot("output_scale"), *of_slot("output_shift")):
        tail = chain.branch(attachment, (tail,), behind=tail, instead=tail)
    chain.finish(tail)


class _Chain:
    """The nodes composed around a call: those that are there are used again, with their values.

    Args:
        call: the bare linear.
    """

    def __init__(self, program: State, call: Node) -> None:
        self.program, self.call, self.parts = program, call, WeightedCall.of(call)
        self.graph = program.module.graph
        self.key: str = call.meta.get("call") or call.name
        self.there = _composed(call, self.key)
        self.inside = {*self.there, call}
        self.tail = composed_value(call)
        self.seen = _expected(self.tail)
        self.known = {_identity(n.target, n.args): n for n in self.there}
        self.used: set[Node] = set()
        self._nodes: dict[str, Node] | None = None

    def source(self, x: Any) -> Any:
        """What the call reads before its input scales."""
        while isinstance(x, Node) and x in self.inside:
            x = x.args[0]
        return x

    def branch(
        self,
        attachment: Attachment,
        args: tuple[Any, ...],
        behind: Node | None = None,
        before: Node | None = None,
        instead: Any = None,
    ) -> Node:
        """The call of a branch.

        Args:
            behind, before: where it stands.
            instead: what its readers would read without it; None for a value of its own.
        """
        path = attachment.path
        kwargs = {} if self.parts is None else dict[str, Any](self.parts.operands)
        if attachment.reads:
            nodes = self._named()
            kwargs = {name: nodes[read] for name, read in attachment.reads.items()} | kwargs
        name = path.replace(".", "_")
        return self._emit("call_module", path, args, kwargs, name, (behind, before), instead)

    def add(self, tail: Node, update: Node) -> Node:
        """Adds what a branch gives."""
        name, args = f"{str(update.target).replace('.', '_')}_add", (tail, update)
        return self._emit("call_function", ATEN.add.Tensor, args, {}, name, (update, None), tail)

    def dense(self, stored: Stored, site: Any) -> Node:
        """The dense weight of a call of a stored format, laid out as the model's own was."""
        operator, args = stored.dense(columns_of(site))
        dense = self._function(operator, args, "dequantise", self.call)
        dense = self._function(ATEN.to.dtype, (dense, value(self.call).dtype), "dense", dense)
        if not isinstance(site, LinearSite) or not site.in_out:
            return dense
        return self._function(ATEN.t.default, (dense,), "dense_t", dense)

    def finish(self, tail: Node) -> None:
        """Lets the call's readers read the end of the chain, and erases what is not used."""
        for old in dict.fromkeys((self.tail, self.call)):
            if old is not tail:
                for reader in [u for u in old.users if u not in self.inside]:
                    reader.replace_input_with(old, tail)
        gone = [n for n in self.there if n not in self.used]
        while gone:
            unread = next(n for n in gone if not n.users)
            self.graph.erase_node(unread)
            gone.remove(unread)
        if self.seen is not None and not alike(self.seen, value(tail)):
            tail.meta.pop("val", None)
            tail.meta["previous"] = self.seen

    def _named(self) -> dict[str, Node]:
        if self._nodes is None:
            self._nodes = site_nodes(self.program.module)
        return self._nodes

    def _function(self, target: Any, args: tuple[Any, ...], name: str, behind: Node) -> Node:
        return self._emit("call_function", target, args, {}, name, (behind, None), None)

    def _emit(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str,
        place: tuple[Node | None, Node | None],
        instead: Any,
    ) -> Node:
        node = self.known.pop(_identity(target, args), None)
        behind, before = place
        if node is None:
            anchor = before or behind or self.call
            inserting = self.graph.inserting_before if before else self.graph.inserting_after
            with inserting(anchor):
                node = self.graph.create_node(kind, target, args, kwargs, name=name)
            node.meta["composed"] = self.key
            if instead is not None:
                node.meta["previous"] = _expected(instead)
        else:
            _rewire(node, args, kwargs)
            if before is not None:
                before.prepend(node)
            elif behind is not None:
                behind.append(node)
        self.inside.add(node)
        self.used.add(node)
        return node


def _identity(target: Any, args: tuple[Any, ...]) -> Any:
    """What tells a composed node from others around its call: a sum is known by what it adds."""
    update = args[1] if target is ATEN.add.Tensor else None
    return target, getattr(update, "target", None)


def _expected(node: Any) -> Any:
    """The value of a node; of one that has none yet, what its readers have seen so far."""
    known = value(node)
    return node.meta.get("previous") if known is None else known


def _rewire(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives a node other operands; it keeps its value only where theirs are like the old ones'."""
    if node.args == args and node.kwargs == kwargs:
        return
    given: Any = (node.args, node.kwargs)
    old, constants = [*map(value, node.all_input_nodes)], map_arg(given, lambda _: None)
    node.args, node.kwargs = args, kwargs
    now = [*map(_expected, node.all_input_nodes)]
    same = constants == map_arg((node.args, node.kwargs), lambda _: None) and len(old) == len(now)
    if not (same and all(a is not None and alike(a, b) for a, b in zip(old, now, strict=True))):
        outdate(node)


def _raise(gm: GraphModule, call: Node) -> Node:
    """Turns a lowered call back into the bare linear it stands for."""
    if call.op != "call_module":
        return call
    x, weight, bias = call.args[-3:]
    with gm.graph.inserting_before(call):
        if (expressed := call.meta.get("expressed")) is not None:
            weight = gm.graph.create_node("call_module", call.target, (weight,), name=expressed[0])
            weight.meta = dict(expressed[1])
        name = str(call.meta.get("call", call.name))
        linear = gm.graph.create_node("call_function", LINEAR, (x, weight, bias), {}, name=name)
    own = ("composed", "expressed")
    linear.meta.update({k: v for k, v in call.meta.items() if k not in own})
    call.replace_all_uses_with(linear)
    gm.graph.erase_node(call)
    return linear


def composed_value(call: Node) -> Node:
    """The value of a linear call with all branches composed around it; other nodes themselves."""
    mine = _composed(call, call.meta.get("call", call.name))
    inside = {*mine, call}
    return next((n for n in mine if any(u not in inside for u in n.users)), call)


def _composed(call: Node, key: str) -> list[Node]:
    """The nodes emitted around a call, found from it (a scan of the graph for every call would
    be quadratic)."""
    nodes: dict[Node, None] = {}
    stack = [call]
    while stack:
        node = stack.pop()
        for near in (*node.all_input_nodes, *node.users):
            if near.meta.get("composed") == key and near not in nodes:
                nodes[near] = None
                stack.append(near)
    return list(nodes)


def fold_ready(program: State, first: frozenset[str] = frozenset()) -> None:
    """Brings every composed call into its plain, unlowered form, `first` innermost."""
    for node in [n for n in program.module.graph.nodes if "expressed" in n.meta]:
        _raise(program.module, node)
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
