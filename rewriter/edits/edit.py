"""The editor: the whole surface through which passes change a program.

Methods name sites and hand over branches; the editor does the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..aten import ancestors, erase_dead, set_attribute, users
from ..errors import PassError
from ..program import BRANCHES, Attachment, Program
from ..sites.sites import (
    AttentionSite,
    ConvSite,
    EmbeddingSite,
    FeedForwardSite,
    LinearSite,
    NormSite,
    Site,
    SublayerSite,
)
from .axes import Channels, channels
from .bias import add_bias
from .branch import (
    Branch,
    Delta,
    Expression,
    InputScale,
    KeyValue,
    OutputScale,
    RowScale,
    Serial,
    Tokens,
)
from .compose import compose, composed_value, site_nodes
from .cut import cut_channels
from .hidden import Hidden, behind_of, hidden_of
from .keyvalue import key_value_widths, prepend_key_value
from .replacing import express, settle
from .signature import add_input, drop_input
from .tokens import prepend_tokens, shift_positions
from .values import Value, input_of, item_of, latest, unshared, valid_of
from .weight import Weight

Linear = Delta | InputScale | OutputScale | RowScale
EMPTY: Mapping[str, None] = MappingProxyType({})


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

    def name(self, site: Site) -> str:
        """A site's id as the name of a module."""
        return site.id.removesuffix(".weight").replace(":", ".")

    def skip(self, site: Site, reason: str) -> None:
        """Reports that a selected site was left alone."""
        self.skipped.append((site.id, reason))

    # Linear sites.

    def weight(self, site: LinearSite) -> Weight:
        """What the site multiplies by."""
        return Weight.of(self.graph_module, site)

    def add(self, site: LinearSite, branch: Delta, **reads: Value | None) -> None:
        """Adds a branch beside a linear: `y = base(x) + branch(x)`."""
        self._attach_linear(site, branch, reads)

    def scale(self, site: LinearSite, branch: InputScale | OutputScale) -> None:
        """Scales a linear's input or output."""
        if isinstance(branch, InputScale) and site.features is not None:
            site = replace(site, features=None)
        self._attach_linear(site, branch)

    def rescale(self, site: LinearSite, branch: RowScale) -> None:
        """Rescales the rows of a linear's weight, below all its other branches."""
        branch.in_out = site.in_out
        if site.features is not None:
            branch.register_buffer("own", torch.tensor(site.features), persistent=False)
        self._attach_linear(site, branch)

    def _attach_linear(
        self, site: LinearSite, branch: Linear, reads: Mapping[str, Value | None] = EMPTY
    ) -> None:
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
        self._attach(site, branch, reads)
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

    def after(self, site: SublayerSite, branch: Serial, **reads: Value | None) -> None:
        """Puts a branch on a sublayer's output: after its dropout, before the residual add."""
        if site.role == "conv":
            branch.axis = 1
        path = self._attach(site, branch, reads)
        add, current = self.node(site.nodes[1]), self.output(site)
        known = latest(self.graph_module, {"": current, **_given(reads)})
        above = set(ancestors(add))
        readers = [add] if add in current.users else [u for u in users(current) if u in above]
        with self.graph_module.graph.inserting_after(known):
            new = self._call(path, (current,), reads)
        new.meta["serial"] = site.id
        for reader in readers:
            reader.replace_input_with(current, new)

    def key_value_widths(self, site: AttentionSite) -> tuple[int, int]:
        """Width of one head's keys and of its values."""
        return key_value_widths(self.graph_module, self.node(site.nodes[0]))

    def prepend_kv(self, site: AttentionSite, branch: KeyValue, **reads: Value | None) -> None:
        """Prepends rows to keys and values (after rotation), widening the mask."""
        path = self._attach(site, branch, reads)
        prepend_key_value(self.graph_module, self.node(site.nodes[0]), path, branch.length)
        self._nodes = site_nodes(self.graph_module)
        self.node(path.replace(".", "_")).kwargs = dict(_given(reads))

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

    # Values that branches read.

    def input(self, site: Site) -> Value:
        """What enters a site: a linear's operand, or the residual that a sublayer adds to."""
        return input_of(site, self._nodes)

    def output(self, site: Site) -> Value:
        """The value of a site, with what is composed around it or put behind it now."""
        current = composed_value(self.node(site.nodes[0]))
        while chained := [u for u in users(current) if u.meta.get("serial") == site.id]:
            current = chained[0]
        return current

    def valid(self, site: Site) -> Value | None:
        """Which tokens of a site's stream are real, bool `[batch, tokens]`; None if all are."""
        return valid_of(self.program, self.node(site.nodes[0]))

    def hidden(self, site: Site, value: Value | None = None) -> Hidden | None:
        """The hidden states that a site reads, with what tells samples and tokens apart.

        For a linear its operand, for an attention that of its queries, for a sublayer the residual
        that it adds to; or `value`, which lies in the site's stream. None where samples and tokens
        cannot be told, which is reported.
        """
        found = hidden_of(self.program, site, self._nodes, value)
        if isinstance(found, Hidden):
            return found
        self.skip(site, found)
        return None

    def behind(self, site: SublayerSite) -> Value | None:
        """The stream behind a sublayer, as it is now: residual plus output, normed in a post-norm
        model. None where it is laid out differently from the output, which is reported.

        It is a copy, so that branches put on the sublayer's output later do not change it.
        """
        found = behind_of(self.graph_module, self.output(site), self.node(site.nodes[1]))
        if found is None:
            self.skip(site, "its output and the stream have different shapes")
        return found

    def add_input(self, name: str, example: Tensor) -> Value:
        """A new input of the program; a call that leaves it out gets `example`."""
        return add_input(self.program, name, example)

    def drop_input(self, name: str, reason: str) -> None:
        """Removes an input that nothing reads any more."""
        erase_dead(self.graph_module)
        drop_input(self.program, name, reason)

    def share(self, name: str, module: nn.Module, **reads: Value | None) -> Value:
        """A module evaluated once a forward, as soon as what it reads is known."""
        path = f"{BRANCHES}.{self._owner()}.{name}"
        module.train(self.graph_module.training)
        self.graph_module.add_submodule(path, module)
        self.program.shared = (*self.program.shared, path)
        with self.graph_module.graph.inserting_after(latest(self.graph_module, _given(reads))):
            return self._call(path, (), reads)

    def item(self, source: Value, key: str | int) -> Value:
        """One entry of what a shared module returns."""
        return item_of(self.graph_module, source, key)

    # Branches that are there already.

    def settle(self, path: str, decided: Mapping[str, Any]) -> None:
        """Replaces a branch by the one that `decided` leaves of it (see `Branch.settled`)."""
        settle(self, path, decided)

    # Base parameters.

    def express(self, site: Site, name: str, branch: Expression, **reads: Value | None) -> None:
        """Feeds every reader of the stored tensor `name` of a site with an expression of it."""
        path = self._attach(site, branch, reads, f"{name}.{branch.slot}")
        self._nodes |= {n.name: n for n in [express(self, name, branch, path, _given(reads))]}

    def freeze(self, keep: Iterable[str] = ()) -> None:
        """Stops gradients to all parameters but the named ones and the branches."""
        kept, inserted = set(keep), self.program.inserted
        for name, parameter in self.graph_module.named_parameters():
            if not name.startswith(inserted) and name not in kept:
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
        name = add_bias(self, site)
        self._nodes = site_nodes(self.graph_module)
        return name

    def norms(self) -> tuple[NormSite, ...]:
        """All normalisations with learnt parameters."""
        return tuple(s for s in self.program.sites if isinstance(s, NormSite))

    # Channels.

    def channels(self, site: FeedForwardSite | AttentionSite) -> Channels:
        """Inner channels or heads of a block, with everything that is coupled to them."""
        return channels(self.program, site)

    def cut(self, group: Channels, keep: Sequence[int]) -> None:
        """Shrinks weights, biases, branches and sizes to the channels that are kept."""
        cut_channels(self.program, group, keep)

    # Plumbing.

    def _owner(self) -> str:
        if self.adapter is None:
            raise PassError("only a pass with an adapter name can insert branches.")
        return self.adapter

    def _attach(
        self,
        site: Site,
        branch: Branch,
        reads: Mapping[str, Value | None] = EMPTY,
        tail: str = "",
    ) -> str:
        adapter = self._owner()
        there = [a for a in self.program.attachments if (a.site, a.slot) == (site.id, branch.slot)]
        if branch.single and there:
            raise PassError(
                f"{site.id} has a branch of the adapter {there[0].adapter!r} already, and "
                f"{branch.single}. Select other sites with where=, or fold that adapter first."
            )
        path = f"{BRANCHES}.{adapter}.{tail or f'{self.name(site)}.{branch.slot}'}"
        held = getattr(self.graph_module, BRANCHES, None)
        known = {path.split(".")[1] for path in self.program.inserted}
        if adapter not in known and hasattr(held, adapter):
            raise PassError(
                f"this program holds the tensors of an earlier adapter {adapter!r}; give this one "
                "another name with name=."
            )
        branch.train(self.graph_module.training)
        self.graph_module.add_submodule(path, branch)
        names = {k: v.name for k, v in _given(reads).items()}
        attachment = Attachment(adapter, site.id, branch.slot, path, names)
        self.program.attachments = (*self.program.attachments, attachment)
        self.edited.append(site.id)
        return path

    def _call(
        self, path: str, args: tuple[Node, ...], reads: Mapping[str, Value | None] = EMPTY
    ) -> Node:
        node = self.graph_module.graph.create_node(
            "call_module", path, args, dict(_given(reads)), name=path.replace(".", "_")
        )
        self._nodes[node.name] = node
        return node

    def finish(self) -> None:
        """Removes what no output needs and regenerates the code."""
        erase_dead(self.graph_module)
        self.program.shared = unshared(self.graph_module, self.program.shared)
        self.graph_module.recompile()


def _given(reads: Mapping[str, Value | None]) -> dict[str, Value]:
    """The reads that exist: where nothing is padded, there is no mask to read."""
    return {name: value for name, value in reads.items() if value is not None}
