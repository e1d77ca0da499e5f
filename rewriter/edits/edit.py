"""The editor: the whole surface through which passes change a program.

Methods name sites and hand over branches; the editor does the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..aten import (
    ADDS,
    ATEN,
    CONVS,
    LINEAR,
    attribute,
    erase_dead,
    is_op,
    parameter_of,
    set_attribute,
    users,
    value,
)  # fmt: skip
from ..errors import PassError
from ..program import BRANCHES, Attachment, Program
from ..sites.sites import (
    AttentionSite,
    ConvSite,
    EmbeddingSite,
    LinearSite,
    NormSite,
    Site,
    SublayerSite,
)
from .branch import Branch, Delta, InputScale, KeyValue, OutputScale, Serial, Tokens
from .compose import compose, composed_value, site_nodes
from .keyvalue import key_value_widths, prepend_key_value
from .region import causal_sites, find_region
from .route import run_on_chosen
from .routing import Routed
from .tokens import prepend_tokens, shift_positions
from .weight import Weight


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
        if site.sliced:
            self.skip(site, f"its calls multiply by a slice of {site.weight}, not by all of it")
            return
        if site.features is not None:
            full = self.weight(site).out_features
            index = torch.zeros(full, dtype=torch.long)
            index[list(site.features)] = torch.arange(1, len(site.features) + 1)
            branch.register_buffer("features", index, persistent=False)
        if site.left:
            branch.axis = -2
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
        if site.role == "conv":
            branch.axis = 1
        path = self._attach(site, branch)
        output, add = self.node(site.nodes[0]), self.node(site.nodes[1])
        current = composed_value(output)
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

    def key_value_widths(self, site: AttentionSite) -> tuple[int, int]:
        """Width of one head's keys and of its values."""
        return key_value_widths(self.graph_module, self.node(site.nodes[0]))

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

    def wrap(
        self, sites: Sequence[SublayerSite], branch: Routed, *, causal: bool = False
    ) -> None:
        """Runs the stretch of a stream from its first to its last given sublayer on the tokens
        that a branch takes; all else passes them by.

        Raises:
            PassError: the stretch has no single way in and out, tells tokens by their order, or
                holds causal attention and `causal` does not allow that.
        """
        region = find_region(self.program, sites, self._nodes)
        ordered = causal_sites(self.program, region)
        if ordered and not causal:
            raise PassError(
                f"{ordered[0]} is causal: which of its tokens are taken would depend on later "
                "ones, which generation does not know. Choose an encoder's blocks with where=, or "
                "allow it for whole prompts and scoring only, with causal=prefill."
            )
        path = self._attach(sites[0], branch)
        valid = self.valid(sites[0])
        run_on_chosen(self.program, region, path, branch.reduction, valid)

    def valid(self, site: Site) -> Node | None:
        """TEMPORARY."""
        from ..aten import placeholders
        return placeholders(self.graph_module).get("attention_mask")

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

    def add_bias(self, site: LinearSite | ConvSite) -> str:
        """Gives a linear or convolution without bias a zero one; returns the parameter's name.

        A bias that the model itself adds behind the product is returned as it is.
        """
        weight = self.graph_module.get_parameter(site.weight)
        if isinstance(site, ConvSite):
            size = site.channels[1]
        else:
            size = self.weight(site).out_features
        own = {self._own_bias(self.node(call), size) for call in site.nodes}
        if len(own) == 1 and (found := own.pop()) is not None:
            return found
        name = self._bias_name(site.weight)
        if name in self.program.added:
            return name
        zeros = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        set_attribute(self.graph_module, name, nn.Parameter(zeros, requires_grad=False))
        self.program.added = (*self.program.added, name)
        graph = self.graph_module.graph
        for call in site.nodes:
            node = self.node(call)
            with graph.inserting_before(node):
                bias = graph.get_attr(name)
            if is_op(node, CONVS | {LINEAR}):
                bias.meta["val"] = _fake(node, size)  # no shape changes, so none is recomputed
                node.args = (node.args[0], node.args[1], bias, *node.args[3:])
                self._know_bias(site.weight, name)
            elif is_op(node, ATEN.addmm.default):
                raise PassError(f"{site.id} has a bias already.")
            else:
                with graph.inserting_before(node):
                    if isinstance(site, LinearSite) and site.left:
                        bias = graph.call_function(ATEN.unsqueeze.default, (bias, -1))
                with graph.inserting_after(node):
                    added = graph.call_function(ATEN.add.Tensor, (node, bias))
                node.replace_all_uses_with(added, delete_user_cb=lambda u, a=added: u is not a)
        self._nodes = site_nodes(self.graph_module)
        return name

    def _own_bias(self, call: Node, size: int) -> str | None:
        """The parameter `[size]` that the model adds to a call's value."""
        for add in (u for u in users(call) if is_op(u, ADDS)):
            for other in add.args[:2]:
                found = parameter_of(other) if other is not call else None
                held = attribute(self.graph_module, found[0]) if found is not None else None
                if isinstance(held, nn.Parameter) and held.shape == (size,) and found is not None:
                    return found[0]
        return None

    def _bias_name(self, weight: str) -> str:
        """Where the added bias of a weight is kept; the model's own tensors keep their names."""
        stem, _, leaf = weight.rpartition(".")
        name = f"{stem}.bias".lstrip(".") if leaf == "weight" else f"{weight}_bias"
        if name in self.program.added:
            return name
        own = {n for n, _ in self.graph_module.named_parameters()} | set(self.program.extras)
        return f"{name}_added" if name in own else name

    def _know_bias(self, weight: str, bias: str) -> None:
        sites = self.program.sites
        items = tuple(
            replace(s, bias=bias)
            if isinstance(s, LinearSite | ConvSite) and s.weight == weight
            else s
            for s in sites
        )
        self.program.sites = replace(sites, items=items)

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


def _fake(node: Node, size: int) -> Tensor | None:
    """A fake vector of the kind of a node's value."""
    val: Any = value(node)
    if val is None:
        return None
    with val.fake_mode:
        return val.new_empty([size])
