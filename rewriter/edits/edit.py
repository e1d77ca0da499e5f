"""The editor: the whole surface through which passes change a program.

Methods name sites and hand over branches; the editor does the graph. Its plumbing is in `attach`,
what only looks in `read`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..branches.branch import Combine, Delta, Expression, InputScale, OutputScale, RowScale, Serial
from ..branches.input_map import InputMap, MappedWeight
from ..branches.input_shift import InputShift, OutputShift
from ..branches.prompts import KeyValue, Tokens
from ..branches.routing import Inserted, Routed
from ..graph.aten import ancestors, set_attribute, users, value
from ..program.history import ITSELF
from ..program.sites import (
    AttentionSite,
    ConvSite,
    EmbeddingSite,
    LinearSite,
    Site,
    SublayerSite,
    WeightSite,
)
from ..program.trained import chosen, train_only
from .attention.keyvalue import gated_by_query, prepend_key_value, remove_rows
from .calls.call import EMPTY, Value, given, latest
from .calls.requirements import require_fit, require_names
from .linear.bias import add_bias
from .linear.combine import combine_serial, hold, member_paths
from .linear.compose import compose
from .linear.expression import express, remember, remove, settle, widened
from .linear.quantise import quantise_weight
from .prompts.positions import shift_positions
from .prompts.tokens import beside, prepend_tokens
from .read import Reading
from .stream.beginning import keep_positions, put_behind, stream_start
from .stream.inserted import run_on_more
from .stream.region import find_region, require_attention
from .stream.route import run_on_chosen
from .structure.axes import Channels
from .structure.cut import cut_channels
from .structure.groups import part_groups

Linear = Delta | InputMap | InputShift | OutputShift | InputScale | OutputScale | RowScale | Combine


class Editor(Reading):
    """Edits a fork of a program, see `Attaching`; inherits what a pass may look at.

    Methods name sites and hand over branches; what these read beside their operand are keywords.
    """

    def quantise(self, site: WeightSite, operator: Callable[..., Tensor], **options: Any) -> bool:
        """Stores the weight of a site in the format of an operator of `kernels/`, in parts below
        its name such as the parameter `{weight}.scale`.

        The digest of the integers goes into the plan, and a replay has to find the same.

        Args:
            site: of the weight, all of which is packed.
            operator: what the calls of linears become (lookups gather parts, others multiply by
                the dense weight, computed anew); its format is registered in `rewriter/weights/`.
            options: the format's own, see its `packed`.

        Returns:
            Whether it was done; if not, the report has the reason.

        Raises:
            PassError: the weight is quantised already or not finite, or the integers are not
                those of the plan.
        """
        return quantise_weight(self, site, operator, options)

    def add(self, site: WeightSite, branch: Delta, **reads: Value | None) -> None:
        """Adds a branch beside the calls of a weight: `y = base(x) + branch(x)`."""
        require_fit(self.method, "add", site, branch)
        self._attach_linear(site, branch, reads)

    def scale(
        self, site: WeightSite, branch: InputScale | OutputScale, **reads: Value | None
    ) -> None:
        """Scales what the calls of a weight read, or their values."""
        require_fit(self.method, "scale", site, branch)
        if isinstance(branch, InputScale) and site.features is not None:
            site = replace(site, features=None)
        self._attach_linear(site, branch, reads)

    def shift(
        self,
        site: LinearSite | EmbeddingSite,
        branch: InputShift | OutputShift,
        **reads: Value | None,
    ) -> None:
        """Adds to what the calls of a linear read, `y = base(x + branch(x))`, or to what those of a
        table give, `y = e + branch(e)`."""
        require_fit(self.method, "shift", site, branch)
        self._attach_linear(replace(site, features=None), branch, reads)

    def map(self, site: WeightSite, branch: InputMap) -> None:
        """Maps what a linear reads, `y = base(M x)`; of other weights, and of the own features of a
        fused one, the weight is mapped, in an expression."""
        require_fit(self.method, "map", site, branch)
        if (isinstance(site, LinearSite) and site.features is None) or self.obstacle(site):
            self._attach_linear(site, branch)  # or reports the obstacle
            return
        with self.below(site.role.replace(".", "_")) if site.features else nullcontext():
            self.express(site, site.weight, MappedWeight(branch, self.shape(site), site.features))

    def rescale(self, site: WeightSite, branch: RowScale, **reads: Value | None) -> None:
        """Rescales the rows of a weight, below all its other branches."""
        require_fit(self.method, "rescale", site, branch)
        if site.features is not None and not self.obstacle(site):
            weight = self.weight(site)
            first = torch.arange(weight.shape.count)[:, None] * weight.out_features
            own = self._index(site, (first + torch.tensor(site.features)).flatten())
            branch.register_buffer("own", own, persistent=False)
        self._attach_linear(site, branch, reads)

    def _attach_linear(
        self,
        site: WeightSite,
        branch: Linear,
        reads: Mapping[str, Value | None] = EMPTY,
        members: tuple[str, ...] = (),
    ) -> None:
        if reason := self.obstacle(site):
            self.skip(site, reason)
            return
        branch.shape = self.shape(site)
        if site.features is not None:
            full = self.weight(site).out_features
            index = torch.zeros(full, dtype=torch.long)
            index[list(site.features)] = torch.arange(1, len(site.features) + 1)
            branch.register_buffer("features", self._index(site, index), persistent=False)
        if site.left:
            branch.axis = -2
        self._attach(site, branch, reads, members=members)
        for name in site.nodes:
            compose(self.program, self.node(name), site.weight)

    def _index(self, site: WeightSite, index: Tensor) -> Tensor:
        """An index on the weight's device; without storage there, it keeps its values here."""
        device = self.weight(site).device
        return index if device.type == "meta" else index.to(device)

    def after(
        self, site: SublayerSite | EmbeddingSite, branch: Serial, **reads: Value | None
    ) -> None:
        """Puts a branch on a sublayer's output: after its dropout, before the residual add. Of an
        embedding, on the stream where that begins: behind all that is added to the table's rows,
        their norm and dropout."""
        require_fit(self.method, "after", site, branch)
        if isinstance(site, EmbeddingSite):
            start = stream_start(self.program, site, self._nodes)
            put_behind(self.program, start, self._attach(site, branch, reads), given(reads))
            self.refresh()
            return
        if site.role == "conv":
            branch.axis = 1
        path = self._attach(site, branch, reads)
        add, current = self.node(site.nodes[1]), self.output(site)
        known = latest(self.graph_module, {"": current, **given(reads)})
        readers = [add]
        if add not in current.users:
            above = set(ancestors(add))
            readers = [u for u in users(current) if u in above]
        with self.graph_module.graph.inserting_after(known):
            new = self._call(path, (current,), reads)
        new.meta |= {"serial": site.id, "previous": value(current)}
        for reader in readers:
            reader.replace_input_with(current, new)

    def prepend_kv(self, site: AttentionSite, branch: KeyValue, **reads: Value | None) -> None:
        """Prepends rows to keys and values (after rotation), widening the mask. Where the branch is
        `by_query`, its read `gates` says how much of them each query sees."""
        require_fit(self.method, "prepend_kv", site, branch)
        if branch.by_query and gated_by_query(self.graph_module, self.node(site.nodes[0])):
            self.skip(site, "it has rows already that each query gates")
            return
        path = self._attach(site, branch, reads)
        core = self.node(site.nodes[0])
        prepend_key_value(self.graph_module, core, path, branch.length, given(reads))
        self.refresh()

    def shift_positions(self, length: int, keys: bool = False) -> None:
        """Counts tokens from `length` on, where attentions have rows in front by now; with `keys`,
        among the keys of biases by distance alone."""
        shift_positions(self.program, length, keys)

    def prepend_tokens(
        self, site: EmbeddingSite, branch: Tokens, place: str = "input", **reads: Value | None
    ) -> None:
        """Prepends `length` tokens whose embeddings are the branch's rows.

        Inputs are padded on the left and the rows overwrite the pads' embeddings, so masks,
        positions and sizes follow by themselves; outputs are stripped to the user's tokens. Where
        a prompt is there already, the new one stands in front of it.
        Another table that the same ids look up gives the row of the pads there, which is reported.
        What the branch reads, alone or through `share`, has the tokens of the input only: the
        site's own `output` without prompt, other embeddings, masks, new inputs.

        Args:
            site, branch, reads: as of the other words.
            place: `input`, or where the stream begins (behind positions, norm and dropout; tokens
                keep their positions): `stream`, before all tokens, so that what reads the first
                token reads the first row; or `second`, behind the first token, which is the same
                where attention is bidirectional but for who reads that.

        Raises:
            PassError: it reads what depends on the prompt, or the tokens lie where none can be put.
        """
        require_fit(self.method, "prepend_tokens", site, branch)
        for other, row in beside(self.program, site):
            self.skip(other, f"it gives its row {row} at the positions of the prompt")
        branch.place = place
        start = None if place == "input" else stream_start(self.program, site, self._nodes)
        path = self._attach(site, branch, reads)
        embedding = self.node(site.nodes[0])
        self.program = prepend_tokens(
            self.program, self.axes, site, embedding, path, given(reads), start
        )
        if start is not None:
            keep_positions(self.program, branch.length)
        self._axes = None  # the sizes are others now
        self.refresh()

    def wrap(
        self,
        sites: Sequence[SublayerSite],
        branch: Routed,
        *,
        causal: bool = False,
        allow: str = "",
        **reads: Value | None,
    ) -> None:
        """Runs a stream, from its first to its last given sublayer, on the tokens that a branch
        takes; what it returns for all tokens goes beside.

        Raises:
            PassError: the region has no single way in and out, tells tokens by their order, or
                holds causal attention and `causal` does not allow that.
        """
        for site in sites:
            require_fit(self.method, "wrap", site, branch)
        region = find_region(self.program, self.axes, sites, self._nodes, causal, allow)
        valid = self.valid(sites[0])
        path = self._attach(sites[0], branch, {**reads, "valid": valid})
        run_on_chosen(self.program, region, path, branch.reduction, valid, given(reads))

    def insert_tokens(
        self, sites: Sequence[SublayerSite], branch: Inserted, **reads: Value | None
    ) -> None:
        """Runs a stream, from its first to its last given sublayer, with the branch's vectors in
        front of its tokens, which are taken off again behind.

        Raises:
            PassError: the region has no single way in and out, tells tokens by their order, or
                holds no attention to its own tokens.
        """
        for site in sites:
            require_fit(self.method, "insert_tokens", site, branch)
        region = find_region(self.program, self.axes, sites, self._nodes, True, whole=True)
        require_attention(self.program, region)
        valid = self.valid(sites[0])
        path = self._attach(sites[0], branch, {**reads, "valid": valid})
        run_on_more(self.program, region, path, valid, given(reads))
        self.refresh()

    def combine(
        self,
        site: LinearSite | SublayerSite,
        branch: Combine,
        members: Sequence[str],
        **reads: Value | None,
    ) -> None:
        """Puts one branch in the place of the sum of the members' branches at a site.

        The members' calls stay and give what each would add; the branch reads that.

        Args:
            members: adapters, or names given to `below` with this pass's adapter in front.

        Raises:
            PassError: a member has no branch at the site, or one that cannot be combined.
        """
        require_fit(self.method, "combine", site, branch)
        paths = member_paths(self, site, members)
        if isinstance(site, LinearSite):
            self._attach_linear(site, branch, reads, paths)
            return
        if site.role == "conv":
            branch.axis = 1
        path = self._attach(site, branch, reads, members=paths)
        combine_serial(self, site, path, paths, given(reads))
        self.refresh()

    def hold(self, *adapters: str) -> None:
        """Stops gradients to other adapters: to their branches, and to base tensors that no
        other one trains."""
        hold(self, adapters)

    def settle(self, path: str, decided: Mapping[str, Any]) -> None:
        """Replaces a branch by the one that `decided` leaves of it (see `Branch.settled`)."""
        settle(self, path, decided)

    def remove(self, path: str) -> None:
        """Takes a branch of a weight, of an attention or behind a sublayer out of the graph. The
        program keeps its tensors, so that going back is exact.

        Raises:
            PassError: the graph cannot do without it (a prompt, a routed region).
        """
        branch = self.graph_module.get_submodule(path)
        remember(self.program, path)
        if isinstance(branch, KeyValue):
            remove_rows(self, path, branch.length)
        else:
            remove(self, path)
        self.refresh()

    def express(
        self, site: Site, name: str | Sequence[str], branch: Expression, **reads: Value | None
    ) -> None:
        """Feeds every reader of the stored tensor `name` of a site with an expression of it, or
        those of several tensors with what one branch computes of them all.

        Raises:
            PassError: the graph reads no such tensor, or one is named twice.
        """
        require_fit(self.method, "express", site, branch)
        names = (name,) if isinstance(name, str) else tuple(name)
        require_names(self.method, site, names)
        path = self._attach(site, branch, reads, f"{names[0]}.{branch.slot}")
        call = express(self, names, branch, path, given(reads))
        self._nodes |= {n.name: n for n in (call, *call.users)}

    def freeze(self) -> None:
        """Stops gradients to all parameters but the branches and what is trained on purpose, by
        adapters or by the user; see `trained`."""
        before = {p for p in self.graph_module.parameters() if p.requires_grad}
        undecided = not self.program.owners
        train_only(self.program, chosen(self.program) if undecided else ())
        mine = self.program.owned.get(ITSELF, ())
        if mine and not self.program.adapters:
            self.notes.append(
                f"goes on training {len(mine)} parameters of the base (first: {mine[0]}), since "
                "they required gradients and others did not"
            )
        if frozen := sum(not p.requires_grad for p in before):
            self.notes.append(
                f"froze {frozen} parameters that required gradients at capture; "
                "train{where=...} keeps some"
            )

    def train(self, name: str) -> None:
        """Makes a base parameter trainable, as a tensor of this program's own: in float32 at
        least (see `like`), cast where it is read."""
        old = self.graph_module.get_parameter(name)
        if not old.requires_grad:
            set_attribute(self.graph_module, name, nn.Parameter(widened(self, name)))
        owner = self.adapter or ITSELF
        self.program.tensors = self.program.tensors.with_trained(owner, [name])

    def train_norms(self) -> None:
        """Makes the learnt parameters of all normalisations trainable."""
        for norm in self.norms():
            self.train(norm.weight)
            if norm.bias is not None:
                self.train(norm.bias)

    def add_bias(self, site: LinearSite | ConvSite) -> str:
        """Gives a linear or convolution without bias a zero one; returns the parameter's name.

        A bias that the model itself adds behind the product is returned as it is.
        """
        name = add_bias(self, site)
        self.refresh()
        return name

    def part_groups(self, site: AttentionSite) -> None:
        """Repeats each head of keys and values for itself, so that `channels` of the attention are
        its query heads one by one, where several share keys; computes what it computed."""
        part_groups(self.program, site)
        self.refresh()

    def cut(self, group: Channels, keep: Sequence[int]) -> None:
        """Shrinks weights, biases, branches and sizes to the channels that are kept."""
        cut_channels(self.program, group, keep)
