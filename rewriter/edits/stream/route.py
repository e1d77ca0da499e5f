"""Running a region on some of its tokens, or on others (`inserted`), in place.

Everything indexed by tokens that enters the region (the stream, rotary values, both axes of masks
and of biases of scores) is gathered where it enters, and sizes come from the gathered tokens.
Nodes keep their names, so sites stay sites and other edits inside the region do not notice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ...branches.routing import LiveKeys, PutTokens, TakeTokens, slots
from ...errors import PassError
from ...graph.aten import (
    ATEN,
    SOFTMAX,
    ancestors,
    attribute,
    inputs,
    is_op,
    named_arguments,
    operands,
    overloads,
    shape,
    submodule,
    value,
)  # fmt: skip
from ...graph.modes import Attention
from ...graph.symbols import fresh_size
from ...program.sites import AttentionSite
from ...program.state import State
from ..attention.keyvalue import WidenMask, add_call
from ..calls.call import branch_call, given, latest
from ..calls.requirements import cycle
from .region import Region

_SIZED = overloads(
    "view", "reshape", "_unsafe_view", "expand", "broadcast_to", "unflatten", "repeat", "zeros",
    "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full",
)  # fmt: skip
"""What is given the sizes of its axes, in order."""
_PARTED = overloads("unflatten")


def run_on_chosen(
    program: State,
    region: Region,
    path: str,
    reduction: int,
    valid: Node | None,
    reads: Mapping[str, Node],
) -> None:
    """Puts the branch at `path` in front of a region, gathers and scatters.

    Args:
        program: edited.
        region: see `find_region`.
        path: of a `Routed` branch.
        reduction: the branch's.
        valid: which tokens are no padding, `[batch, tokens]`, or None where all are valid.
        reads: what else the branch reads.

    Raises:
        PassError: a value enters the region with its tokens in an axis that cannot be gathered, or
            a read is computed in the region.
    """
    reads = known(program, region, path, {**reads, **given({"valid": valid})})
    rewrite = Rewrite(program, region, path, reduction, reads)
    rewrite.gather()
    if valid is not None:
        rewrite.hide()
    rewrite.scatter()


def known(program: State, region: Region, path: str, reads: dict[str, Node]) -> dict[str, Node]:
    """The reads of a branch in front of a region, if none is computed inside."""
    branch: Any = program.module.get_submodule(path)
    branch.tokens_first = bool(region.batch)
    for name, read in reads.items():
        if not set(region.nodes).isdisjoint(ancestors(read)):
            what = f"the branch {type(branch).__name__} at {region.site}"
            raise PassError(cycle(what, f"{name} = {read.name}", "what is known before the region"))
    return reads


class Rewrite:
    """One region under edit, with what has been gathered for it so far."""

    def __init__(
        self, program: State, region: Region, path: str, reduction: int, reads: Mapping[str, Node]
    ) -> None:
        self.enter_at(program, region)
        size = slots(region.tokens, reduction) if isinstance(region.tokens, int) else None
        names = ("index", "weight", "live", "aside")
        nodes = self.call(path, region.read, reads, names, lambda: self._values(size, reduction))
        self.index, self.weight, self.live, self.aside = nodes
        self.size = size or self.size_of(nodes[-1], self.index, 1)

    def enter_at(self, program: State, region: Region) -> None:
        self.program, self.region = program, region
        self.gm: GraphModule = program.module
        self.inside = set(region.nodes)
        self.taken: dict[tuple[Node, int], Node] = {}
        self.size: Any = None

    def call(
        self,
        path: str,
        operand: Node,
        reads: Mapping[str, Node],
        names: Sequence[str],
        values: Callable[[], tuple[Tensor, ...]],
    ) -> list[Node]:
        """The results of the branch, called as soon as what it reads is known."""
        graph = self.gm.graph
        known = latest(self.gm, {"": operand, **reads})
        early = self._before(known)
        with graph.inserting_after(known):
            last = called = branch_call(self.gm, path, (operand,), reads)
        nodes: list[Node] = []
        for place, part in enumerate(names):
            with graph.inserting_after(last):
                args = (called, place)
                last = graph.create_node(
                    "call_function", operator.getitem, args, {}, name=f"{called.name}_{part}"
                )
            nodes.append(last)
        called.meta["val"] = values()
        for node, val in zip(nodes, called.meta["val"], strict=True):
            node.meta["val"] = val
        for node in reversed(early):
            last.append(node)
        return nodes

    def size_of(self, last: Node, of: Node, axis: int) -> Node:
        """The number of tokens inside, read off a value behind `last`."""
        with self.gm.graph.inserting_after(last):
            return self.gm.graph.call_function(ATEN.sym_size.int, (of, axis))

    def _values(self, size: Any, reduction: int) -> tuple[Tensor, ...]:
        """What the branch returns, with a fresh symbol for how many tokens it takes."""
        x: Any = value(self.region.read)
        tokens = self.region.tokens
        if size is None:
            label = self.program.symbols.get(str(tokens), str(tokens))
            label = f"{label}/{reduction}"
            size = fresh_size(self.gm, x.fake_mode, label)
            self.program.symbols = {**self.program.symbols, str(size): label}
        with x.fake_mode:
            like = x.new_empty([x.shape[self.region.batch], size])
            return like.long(), like, like.bool(), torch.empty_like(x)

    def _before(self, place: Node) -> list[Node]:
        """The region's nodes that stand before `place`."""
        nodes: list[Node] = []
        for node in self.gm.graph.nodes:
            if node is place:
                return nodes
            if node in self.inside:
                nodes.append(node)
        return nodes

    # Ways in.

    def gather(self) -> None:
        """Replaces everything that enters by what the chosen tokens have of it."""
        for node in [n for n in self.gm.graph.nodes if n in self.inside]:
            rank = len(shape(node) or ())
            with self.gm.graph.inserting_before(node):
                if is_op(node, _SIZED):
                    node.args, node.kwargs = self._resized(node, rank)
                else:
                    given: Any = map_arg(
                        (node.args, node.kwargs), lambda v, r=rank: self._enter(v, r)
                    )
                    node.args, node.kwargs = given

    def _resized(self, node: Node, rank: int) -> tuple[Any, Any]:
        """The arguments of a call, with the new number of tokens where sizes are given: for the
        axes along which these tokens lie, whatever else is as many."""
        start = int(named_arguments(node)["dim"]) % rank if is_op(node, _PARTED) else 0
        own, held = self.region.line.alone(node), self.region.line.held(node)

        def enter(given: Any) -> Any:
            return map_arg(given, lambda v: self._enter(v, rank))

        def put(given: Any) -> Any:
            if not isinstance(given, list | tuple):
                return enter(given)
            pairs: Any = enumerate(given, start)
            return [
                self._multiple(g) if k in held and k not in own and self._multiplies(g)
                else enter(g) if not self._counts(g) else self.size if k in own else g
                for k, g in pairs
            ]  # fmt: skip

        return tuple(map(put, node.args)), {k: put(v) for k, v in node.kwargs.items()}

    def _multiplies(self, given: Any) -> bool:
        """Whether a size that a call is given is a fixed number of tokens times others, not -1."""
        size, tokens = value(given) if isinstance(given, Node) else given, self.region.tokens
        if not isinstance(tokens, int) or (isinstance(size, int) and size < 0):
            return False
        return bool(statically_known_true(size % tokens == 0))

    def _multiple(self, given: Any) -> Any:
        """The same times the new number of tokens."""
        tokens = self.region.tokens
        if isinstance(given, int) and isinstance(self.size, int):
            return given // tokens * self.size
        call = self.gm.graph.call_function
        others = (
            call(operator.floordiv, (given, tokens)) if isinstance(given, Node) else given // tokens
        )
        return call(operator.mul, (others, self.size))

    def _counts(self, given: Any) -> bool:
        """Whether a size that a call is given is the number of tokens, not -1."""
        return self.region.is_tokens(value(given) if isinstance(given, Node) else given)

    def _enter(self, node: Node, rank: int) -> Node:
        """What stands for a value inside the region, whose reader has `rank` axes."""
        if node in self.inside:
            return node
        if node in (self.region.entry, self.region.read):
            return self._take(node, (1 - self.region.batch,), 3, self.region.batch)
        tensor = value(node)
        if isinstance(tensor, torch.SymInt):
            if self.region.is_tokens(tensor):
                return self.size
            return self._again(node, 0) if self.region.has_tokens(tensor) else node
        size, line = shape(node), self.region.line
        if size is None or self._stored(node):
            return node
        if line.unclear(node):
            raise self._refuse(node, "of which nothing shows what lies along its axes")
        if line.mixed(node):
            widened = isinstance(submodule(self.gm, node), WidenMask)
            return self._again(node, rank if widened else len(size))
        alone = line.alone(node)
        if not alone:
            return node
        front = max(0, rank - len(size))
        axes = tuple(k + front for k in alone)
        if self.region.batch and rank == len(size) == 3 and axes == (0,) and self._batch(node, 1):
            return self._take(node, axes, rank, 1)
        if axes[0] == 0 or not (front or self._batch(node, 0)):
            raise self._refuse(
                node,
                "with its tokens beside merged or missing batch rows, so they cannot be gathered",
            )
        return self._take(node, axes, rank)

    def _refuse(self, node: Node, how: str) -> PassError:
        return PassError(
            f"{self.region.site}: {node.name} {shape(node)} enters the region {how}. Leave this "
            "block out with where=."
        )

    def _stored(self, node: Node) -> bool:
        return node.op == "get_attr" and isinstance(
            attribute(self.gm, str(node.target)), nn.Parameter
        )

    def _batch(self, node: Node, place: int) -> bool:
        """Whether an axis has size 1, or is that of the stream's samples, by whatever symbol."""
        size, own = (shape(node) or ())[place], shape(self.region.entry) or ()
        if str(size) == "1" or self.region.rows.alone(node) == (place,):
            return True
        label = self.program.symbols.get
        named = label(str(size), "")
        return bool(named) and named == label(str(own[self.region.batch]), "-")

    def _take(self, node: Node, axes: tuple[int, ...], rank: int, batch: int = 0) -> Node:
        if (node, rank) not in self.taken:
            module = TakeTokens(axes, rank, batch)
            self.taken[node, rank] = add_call(self.gm, "take_tokens", module, (node, self.index))
        return self.taken[node, rank]

    def _again(self, node: Node, rank: int) -> Node:
        """A value computed once more, from what the chosen tokens have of its inputs."""
        if node.op in ("placeholder", "get_attr"):
            raise self._refuse(node, "with its tokens mixed into another size")
        if (node, -1) not in self.taken:
            for source in inputs(node):
                self._enter(source, rank)  # their gathers come first
            copy = self.gm.graph.node_copy(node, lambda v: self._enter(v, rank))
            copy.meta.pop("val", None)
            self.taken[node, -1] = copy
        return self.taken[node, -1]

    # Inside.

    def hide(self) -> None:
        """Hides the keys of slots that are not in use from every attention on these tokens."""
        sites = [s for s in self.program.sites if isinstance(s, AttentionSite)]
        own = {n for s in sites if not s.cross for n in s.nodes}
        cross = {n for s in sites if s.cross for n in s.nodes}
        for node in self.region.nodes:
            if node.name in cross:
                continue
            if isinstance(submodule(self.gm, node), Attention):
                self._hide_fused(node)
            elif node.name in own:
                self._hide_scores(node)

    def _hide_fused(self, core: Node) -> None:
        query, key, value_node, mask, causal = (*operands(core), None, False)[:5]
        kwargs = dict(core.kwargs)
        mask, causal = kwargs.pop("mask", mask), kwargs.pop("is_causal", causal)
        with self.gm.graph.inserting_before(core):
            args = (mask, self.live, key)
            seen = add_call(self.gm, "live_keys", LiveKeys(bool(causal)), args)
        core.args, core.kwargs = (query, key, value_node, seen, False), kwargs

    def _hide_scores(self, core: Node) -> None:
        node: Any = operands(core)[0]
        while not is_op(node, SOFTMAX) and inputs(node):
            node = inputs(node)[0]
        scores = shape(inputs(node)[0]) if is_op(node, SOFTMAX) else None
        if scores is None or len(scores) != 4:
            raise PassError(
                f"{self.region.site}: the scores of the attention at {core.name} are not [batch, "
                "heads, queries, keys], so keys cannot be hidden. Leave this block out with where=."
            )
        with self.gm.graph.inserting_before(node):
            seen = add_call(self.gm, "live_keys", LiveKeys(), (inputs(node)[0], self.live))
        node.update_arg(0, seen)

    # The way out.

    def scatter(self) -> None:
        """Adds the region's update to the chosen tokens, and the branch's value to all."""
        region = self.region
        with self.gm.graph.inserting_before(region.exit):
            before = self._take(region.entry, (1 - region.batch,), 3, region.batch)
        args = (region.entry, before, region.exit, self.index, self.weight, self.aside)
        with self.gm.graph.inserting_after(region.exit):
            put = add_call(self.gm, "put_tokens", PutTokens(bool(region.batch)), args)
        put.meta["val"] = value(region.exit)
        region.exit.replace_all_uses_with(put, delete_user_cb=lambda u: u is not put)
