"""The editor: the whole surface through which passes change a program.

Methods name sites and hand over branches; the editor does the graph. The branches of one linear
call are always emitted in one fixed order (input scale, base plus deltas, output scale), so the
order of passes does not change the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .aten import (
    ATEN,
    LINEAR,
    MATMULS,
    erase_dead,
    is_op,
    parameter_of,
    set_attribute,
    users,
)  # fmt: skip
from .branch import Branch, Delta, InputScale, KeyValue, OutputScale, Serial, Tokens
from .errors import PassError
from .program import BRANCHES, Attachment, Program
from .sites import AttentionSite, EmbeddingSite, LinearSite, NormSite, Site, SublayerSite
from .soft import prepend_key_value, prepend_tokens, shift_positions
from .weight import Weight

_ORDER = {"input_scale": 0, "delta": 1, "output_scale": 2}


class Editor:
    """Edits a fork of a program; nothing else may hold the fork while it is edited.

    Attributes:
        program: the fork.
        generator: the random source of everything that a pass initialises.
        edited, skipped: what the report will say.
        figures: measured by the pass itself, added to its certificate.
    """

    def __init__(self, program: Program, adapter: str | None = None, seed: int = 0) -> None:
        self.program = program
        self.adapter = adapter
        self.generator = torch.Generator().manual_seed(seed)
        self.edited: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self.figures: dict[str, float] = {}
        self._nodes = site_nodes(self.graph_module)

    @property
    def graph_module(self) -> GraphModule:
        """The graph under edit."""
        return self.program.module

    def node(self, name: str) -> Node:
        """The graph node of a site."""
        return self._nodes[name]

    def skip(self, site: Site, reason: str) -> None:
        """Reports that a selected site was left alone."""
        self.skipped.append((site.id, reason))

    # Linear sites.

    def weight(self, site: LinearSite) -> Weight:
        """What the site multiplies by."""
        return Weight.of(self.graph_module, site)

    def add(self, site: LinearSite, branch: Delta) -> None:
        """Adds a branch beside a linear: `y = base(x) + branch(x)`."""
        self._attach_linear(site, branch)

    def scale(self, site: LinearSite, branch: InputScale | OutputScale) -> None:
        """Scales a linear's input or output."""
        if isinstance(branch, InputScale) and site.features is not None:
            site = replace(site, features=None)
        self._attach_linear(site, branch)

    def _attach_linear(self, site: LinearSite, branch: Delta | InputScale | OutputScale) -> None:
        if site.features is not None:
            full = self.weight(site).out_features
            index = torch.zeros(full, dtype=torch.long)
            index[list(site.features)] = torch.arange(1, len(site.features) + 1)
            branch.register_buffer("features", index, persistent=False)
        self._attach(site, branch)
        for name in site.nodes:
            compose(self.program, self.node(name), site.weight)

    def like(self, site: Site) -> Tensor:
        """An empty tensor with the dtype and device of a site's value, for `.to(...)`."""
        val = self.node(site.nodes[0]).meta.get("val")
        if not isinstance(val, Tensor):
            raise PassError(f"{site.id} has no recorded value.")
        return torch.empty(0, dtype=val.dtype, device=val.device)

    def table(self, site: EmbeddingSite) -> Tensor:
        """The embedding table of a site, `[size, width]`."""
        return self.graph_module.get_parameter(site.weight)

    # Sublayers, attention, embeddings.

    def after(self, site: SublayerSite, branch: Serial) -> None:
        """Puts a branch on a sublayer's output: after its dropout, before the residual add."""
        path = self._attach(site, branch)
        output, add = self.node(site.nodes[0]), self.node(site.nodes[1])
        current = output
        while True:  # behind earlier serial branches
            chained = next((u for u in users(current) if u.meta.get("serial") == site.id), None)
            if chained is None:
                break
            current = chained
        readers = [add] if add in current.users else users(current)
        with self.graph_module.graph.inserting_after(current):
            new = self._call(path, (current,))
        new.meta["serial"] = site.id
        for reader in readers:
            reader.replace_input_with(current, new)

    def prepend_kv(self, site: AttentionSite, branch: KeyValue) -> None:
        """Prepends rows to keys and values (after rotation), widening the mask."""
        path = self._attach(site, branch)
        prepend_key_value(self.graph_module, self.node(site.nodes[0]), path, branch.length)

    def shift_positions(self, length: int) -> None:
        """Adds `length` to every token's position."""
        shift_positions(self.program, length)

    def prepend_tokens(self, site: EmbeddingSite, branch: Tokens) -> None:
        """Prepends `length` tokens whose embeddings are the branch's rows.

        Inputs are padded on the left and the rows overwrite the pads' embeddings, so masks,
        positions and sizes follow by themselves; outputs are stripped to the user's tokens.
        """
        path = self._attach(site, branch)
        self.program = prepend_tokens(self.program, site, self.node(site.nodes[0]), path, branch)

    # Base parameters.

    def freeze(self, keep: Iterable[str] = ()) -> None:
        """Stops gradients to all parameters but the named ones and the branches."""
        kept = set(keep)
        for name, parameter in self.graph_module.named_parameters():
            if not name.startswith(f"{BRANCHES}.") and name not in kept:
                parameter.requires_grad_(False)

    def train(self, name: str) -> None:
        """Makes a base parameter trainable, as a tensor of this program's own."""
        old = self.graph_module.get_parameter(name)
        if not old.requires_grad:
            fresh = nn.Parameter(old.detach().clone())
            set_attribute(self.graph_module, name, fresh)
        owned = dict(self.program.owned)
        adapter = self.adapter or ""
        owned[adapter] = tuple(dict.fromkeys((*owned.get(adapter, ()), name)))
        self.program.owned = owned

    def add_bias(self, site: LinearSite) -> str:
        """Gives a linear without bias a zero one; returns the new parameter's name.

        A bias of its own that the model adds behind the product is returned as it is.
        """
        stem, _, leaf = site.weight.rpartition(".")
        name = f"{stem}.bias".lstrip(".") if leaf == "weight" else f"{site.weight}_bias"
        weight = self.weight(site)
        known = dict(self.graph_module.named_parameters())
        if name not in self.program.added:
            if name in known and known[name].shape == (weight.out_features,):
                return name
            zeros = torch.zeros(weight.out_features, dtype=weight.dtype, device=weight.device)
            set_attribute(self.graph_module, name, nn.Parameter(zeros, requires_grad=False))
            self.program.added = (*self.program.added, name)
        for call in site.nodes:
            node = self.node(call)
            with self.graph_module.graph.inserting_before(node):
                bias = self.graph_module.graph.get_attr(name)
            if is_op(node, LINEAR):
                node.args = (node.args[0], node.args[1], bias)
            elif is_op(node, ATEN.addmm.default):
                raise PassError(f"{site.id} has a bias already.")
            else:
                if site.left:
                    with self.graph_module.graph.inserting_before(node):
                        bias = self.graph_module.graph.call_function(
                            ATEN.unsqueeze.default, (bias, 1)
                        )
                with self.graph_module.graph.inserting_after(node):
                    added = self.graph_module.graph.call_function(ATEN.add.Tensor, (node, bias))
                node.replace_all_uses_with(added, delete_user_cb=lambda u, a=added: u is not a)
        self._nodes = site_nodes(self.graph_module)
        return name

    def norms(self) -> tuple[NormSite, ...]:
        """All normalisations with learnt parameters."""
        return tuple(s for s in self.program.sites if isinstance(s, NormSite))

    # Plumbing.

    def _attach(self, site: Site, branch: Branch) -> str:
        adapter = self.adapter
        if adapter is None:
            raise PassError("only a pass with an adapter name can insert branches.")
        name = site.id.removesuffix(".weight").replace(":", ".")
        path = f"{BRANCHES}.{adapter}.{name}.{branch.slot}"
        branch.train(self.graph_module.training)
        self.graph_module.add_submodule(path, branch)
        attachment = Attachment(adapter, site.id, branch.slot, path)
        self.program.attachments = (*self.program.attachments, attachment)
        self.edited.append(site.id)
        return path

    def _call(self, path: str, args: tuple[Node, ...]) -> Node:
        node = self.graph_module.graph.create_node(
            "call_module", path, args, {}, name=path.replace(".", "_")
        )
        self._nodes[node.name] = node
        return node

    def finish(self) -> None:
        """Removes what no output needs and regenerates the code."""
        erase_dead(self.graph_module)
        self.graph_module.recompile()


def site_nodes(gm: GraphModule) -> dict[str, Node]:
    """Graph nodes by the name that sites use; a lowered call stands for its linear."""
    return {n.meta.get("call", n.name): n for n in gm.graph.nodes}


def at_weight(
    program: Program, weight: str, first: frozenset[str] = frozenset()
) -> list[Attachment]:
    """The branches of all sites of one weight, in the fixed order of composition.

    Of the same slot, those with a path in `first` come innermost (sums and products commute).
    """
    ids = {s.id for s in program.sites if isinstance(s, LinearSite) and s.weight == weight}
    found = [a for a in program.attachments if a.site in ids and a.slot in _ORDER]
    return sorted(found, key=lambda a: (_ORDER[a.slot], a.path not in first, a.adapter, a.site))


def compose(program: Program, call: Node, weight: str, first: frozenset[str] = frozenset()) -> None:
    """Emits all branches of one linear call afresh, in the fixed order."""
    gm = program.module
    call = _raise(gm, call)
    key = call.meta.get("call", call.name)
    _decompose(gm, call, key)
    mine = at_weight(program, weight, first)

    def slot(kind: str) -> list[str]:
        return [a.path for a in mine if a.slot == kind]

    def emit(kind: str, target: str | Callable[..., Tensor], args: tuple[object, ...], name: str):
        node = gm.graph.create_node(kind, target, args, {}, name=name)  # pyright: ignore[reportArgumentType]
        node.meta["composed"] = key
        return node

    left = _is_left(call)

    def turn(node: object, name: str) -> object:
        """`[..., features, tokens]` of a left product as branches want it, and back."""
        return emit("call_function", ATEN.mT.default, (node,), f"{name}_mt") if left else node

    def through(path: str, node: object) -> Node:
        name = path.replace(".", "_")
        inside = emit("call_module", path, (turn(node, name),), name)
        turned = turn(inside, name)
        return turned if isinstance(turned, Node) else inside

    data = _data_operand(call)
    x: object = call.args[data]
    with gm.graph.inserting_before(call):
        for path in slot("input_scale"):
            x = through(path, x)
    call.update_arg(data, x)
    tail = call
    readers = users(call)
    for path in slot("delta"):
        with gm.graph.inserting_before(tail.next):
            delta = through(path, x)
            name = path.replace(".", "_") + "_add"
            tail = emit("call_function", ATEN.add.Tensor, (tail, delta), name)
    for path in slot("output_scale"):
        with gm.graph.inserting_before(tail.next):
            tail = through(path, tail)
    if tail is not call:
        inside = {n for n in gm.graph.nodes if n.meta.get("composed") == key}
        for reader in [*readers, *(u for u in call.users if u not in readers)]:
            if reader not in inside:
                reader.replace_input_with(call, tail)


def _is_left(call: Node) -> bool:
    """Whether a linear is called as `W @ x`, with its features on the last axis but one."""
    return is_op(call, MATMULS) and parameter_of(call.args[0]) is not None


def _data_operand(call: Node) -> int:
    """Which argument of a linear's call is its input."""
    return 1 if is_op(call, ATEN.addmm.default) or _is_left(call) else 0


def _raise(gm: GraphModule, call: Node) -> Node:
    """Turns a lowered call back into the bare linear it stands for."""
    if call.op != "call_module":
        return call
    with gm.graph.inserting_before(call):
        name = str(call.meta.get("call", call.name))
        linear = gm.graph.create_node("call_function", LINEAR, call.args, {}, name=name)
    linear.meta.update({k: v for k, v in call.meta.items() if k != "composed"})
    call.replace_all_uses_with(linear)
    gm.graph.erase_node(call)
    return linear


def _decompose(gm: GraphModule, call: Node, key: str) -> None:
    """Removes the composed branches around a call, leaving the bare linear."""
    mine = [n for n in gm.graph.nodes if n.meta.get("composed") == key]
    if not mine:
        return
    inside = {*mine, call}
    tail = next((n for n in reversed(mine) if any(u not in inside for u in n.users)), call)
    data = _data_operand(call)
    x = call.args[data]
    while isinstance(x, Node) and x in inside:
        x = x.args[0]
    call.update_arg(data, x)
    if tail is not call:
        for reader in [u for u in tail.users if u not in inside]:
            reader.replace_input_with(tail, call)
    for node in reversed(mine):
        gm.graph.erase_node(node)


def fold_ready(program: Program, first: frozenset[str] = frozenset()) -> None:
    """Re-emits every composed call in its plain, unlowered form, `first` innermost."""
    done: set[str] = set()
    for site in program.sites:
        if isinstance(site, LinearSite) and at_weight(program, site.weight):
            for name in site.nodes:
                if name not in done:
                    compose(program, site_nodes(program.module)[name], site.weight, first)
                    done.add(name)
