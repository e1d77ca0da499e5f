"""Which indices of which axes are one channel: the analysis that structured cuts stand on.

An axis of a value carries a label for every index: the channel it belongs to, or none (-1). From a
first axis labels spread both ways through everything that keeps channels apart: element-wise
steps, views, slices, concatenations, the axes of weights, biases and branches. A contraction ends
them. Two labels that meet at one index become one channel (query heads of one key head).
Anything that mixes labelled indices (a norm, a softmax, an unknown operator) refuses the cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...axes.relation import Bundle, Grid, Ref, Relation, Tie, leading, owner, sizes_of
from ...axes.ties import GETITEM, divides, relations
from ...axes.views import copies
from ...branches.branch import Branch, RowScale
from ...errors import PassError
from ...graph.aten import (
    is_op,
    named_arguments,
    overloads,
    shape,
    source_line,
    submodule,
    users,
    value,
)
from ...graph.weighted_call import data_of, stored_of
from ...program.sites import AttentionSite, FeedForwardSite, LinearSite, SublayerSite
from ...program.state import State

_NORMS = overloads("layer_norm", "rms_norm")
_MEANS = overloads("mean", "var", "var_mean")


@dataclass(frozen=True)
class Channels:
    """The coupled channels of one place.

    Attributes:
        roots: for each channel, numbered along the axis that the analysis started from, the first
            one that it is coupled to (mostly itself).
        labels: (graph node or name of a stored tensor, axis) -> channel of each index, -1 none.
    """

    roots: Tensor
    labels: Mapping[Ref, Tensor]

    @property
    def stored(self) -> dict[str, dict[int, Tensor]]:
        """Name of each stored tensor that has a part in the channels -> axis -> labels."""
        rows: dict[str, dict[int, Tensor]] = {}
        for (name, axis), labels in self.labels.items():
            if isinstance(name, str):
                rows.setdefault(name, {})[axis] = labels
        return rows

    @property
    def count(self) -> int:
        """How many channels there are."""
        return len(self.roots)


def channels(program: State, site: FeedForwardSite | AttentionSite | SublayerSite) -> Channels:
    """What a place can lose: the inner channels of a feed-forward block, numbered as the inputs of
    its down projection; the heads of an attention, coupled where they share keys and values; the
    width of the stream that a sublayer adds to. Norms of the stream are then over what is left.

    Raises:
        PassError: they cannot be told apart everywhere; says where and why.
    """
    nodes = {n.meta.get("call", n.name): n for n in program.module.graph.nodes}
    if isinstance(site, AttentionSite):
        core = nodes[site.nodes[0]]
        if len(shape(core) or ()) != 4:
            raise PassError(
                f"{site.id}: its heads cannot be cut, because they share an axis with the samples. "
                "Leave this block out with where=."
            )
        axis = 2 if shape(core)[2:3] == (site.heads,) else 1  # pyright: ignore
        return _Spread(program.module).run((core, axis), site.heads, site.id)
    if isinstance(site, SublayerSite):
        return _width(program, site, nodes[site.nodes[1]])
    if site.experts:
        raise PassError(
            f"{site.id}: its {site.experts} experts share one tensor, and every expert would have "
            "to lose the same channels. Select the dense blocks only."
        )
    down = program.sites[site.down]
    if not isinstance(down, LinearSite):
        raise PassError(f"{site.id}: its down projection is not a linear.")
    call = nodes[down.nodes[0]]
    data = data_of(call)
    rank = len(shape(data) or ())
    start = owner(data), rank - 2 if down.left else rank - 1
    return _Spread(program.module).run(start, down.in_features, site.id)


def _width(program: State, site: SublayerSite, add: Node) -> Channels:
    size = (shape(add) or (0,))[-1]
    if site.role == "conv" or not isinstance(size, int):
        raise PassError(
            f"{site.id}: the width of its stream is no last axis of fixed size. Select sublayers "
            "of a transformer with where=."
        )
    start = add, len(shape(add) or ()) - 1
    return _Spread(program.module, norms=True).run(start, size, site.id)


def _normed(node: Node) -> list[Relation]:
    """What a norm over the last axes, or a mean, says of an axis that may lose places: each place
    stays what it is, and the statistics are over those that are left."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, Node) or shape(source) is None:
        return []
    if is_op(node, _NORMS):
        return [t for x in node.all_input_nodes for t in leading(x, node, 0)]
    dims = named_arguments(node).get("dim")
    if not is_op(node, _MEANS) or not isinstance(dims, int | list | tuple):
        return []
    axes = (dims,) if isinstance(dims, int) else dims
    rank = len(sizes_of(source))
    refs = [(owner(source), int(a) % rank) for a in axes]
    return [Tie(ref, ref) for ref in refs]


class _Spread:
    """One run of the analysis."""

    def __init__(self, gm: GraphModule, norms: bool = False) -> None:
        self.gm, self.norms = gm, norms
        self.labels: dict[Ref, Tensor] = {}
        self.parent: list[int] = []
        self.copies = {ref for node in gm.graph.nodes for ref in copies(node)}
        self.readers: dict[str, list[Node]] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self.readers.setdefault(str(node.target), []).append(node)
            if (call := stored_of(node)) is not None:
                self.readers.setdefault(call.weight, []).extend(call.parts.values())
            module = submodule(gm, node)
            if isinstance(module, Branch):
                for name, _ in (*module.named_parameters(), *module.named_buffers()):
                    self.readers.setdefault(f"{node.target}.{name}", []).append(node)
        self.queue: dict[Node, None] = {}
        self.seen: dict[Node, list[Relation]] = {}

    def run(self, start: Ref, count: int, where: str) -> Channels:
        """Spreads labels from one axis to a fixpoint."""
        self.parent = list(range(count))
        self._put(start, torch.arange(count))
        while self.queue:
            node = next(iter(self.queue))
            del self.queue[node]
            if node not in self.seen:
                every = [*relations(self.gm, node), *(_normed(node) if self.norms else ())]
                self.seen[node] = [r for r in every if not isinstance(r, Grid) or r.fixed]
            for relation in self.seen[node]:
                self._apply(relation)
        for node, axes in self.seen.items():
            if node.op != "get_attr" and (reason := self._mixes(node, axes)):
                line = source_line(node)
                raise PassError(
                    f"{where}: its channels cannot be cut, because {reason} at {node.name}"
                    f"{f' ({line})' if line else ''}. Leave this block out with where=."
                )
        roots = torch.tensor([*(self._root(i) for i in range(count)), -1])
        return Channels(roots[:-1], {ref: roots[labels] for ref, labels in self.labels.items()})

    def _put(self, ref: Ref, labels: Tensor) -> None:
        old = self.labels.get(ref)
        if old is None:
            old = torch.full_like(labels, -1)
        both = (old >= 0) & (labels >= 0) & (old != labels)
        if bool(both.any()):
            pairs = torch.unique(torch.stack([old[both], labels[both]], 1), dim=0)
            for a, b in pairs.tolist():
                x, y = sorted((self._root(a), self._root(b)))
                self.parent[y] = x
        fresh = (old < 0) & (labels >= 0)
        if not bool(fresh.any()):
            return
        self.labels[ref] = torch.where(fresh, labels, old)
        name = ref[0]
        near = self.readers.get(name, []) if isinstance(name, str) else [name]
        for node in near:
            for reader in (node, *users(node)):
                self.queue[reader] = None
                if divides(self.gm, reader):
                    self.queue.update(dict.fromkeys(u for u in reader.users if is_op(u, GETITEM)))

    def _root(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def _apply(self, relation: Relation) -> None:
        if isinstance(relation, Grid):
            self._apply_grid(relation)
            return
        if isinstance(relation, Bundle):
            if (labels := self.labels.get(relation.axis)) is not None:
                runs = labels.split(relation.size)
                self._put(relation.axis, torch.cat([r.amax().expand(len(r)) for r in runs]))
            return
        a, b = self.labels.get(relation.a), self.labels.get(relation.b)
        index = relation.index
        if a is not None:
            moved = a if index is None else torch.cat([a, a.new_tensor([-1])])[index]
            self._put(relation.b, moved)
        if b is not None and index is None:
            self._put(relation.a, b)
        elif b is not None and index is not None:
            size = len(self.labels[relation.a]) if a is not None else relation.size
            back = torch.full((size,), -1)
            kept = (index >= 0) & (b >= 0)
            back[index[kept]] = b[kept]  # where several meet, the way back couples them
            self._put(relation.a, back)

    def _apply_grid(self, grid: Grid) -> None:
        """Labels pass between a merged axis and the one of its parts that they vary along."""
        sizes = [size for _, size in grid.parts]
        for k, (ref, _) in enumerate(grid.parts):
            labels = self.labels.get(ref)
            if labels is not None:
                view = [1] * len(sizes)
                view[k] = sizes[k]
                self._put(grid.merged, labels.view(view).expand(sizes).reshape(-1))
        merged = self.labels.get(grid.merged)
        if merged is None:
            return
        table = merged.view(sizes)
        for k, (ref, _) in enumerate(grid.parts):
            others = [i for i in range(len(sizes)) if i != k]
            rows = table.permute(k, *others).reshape(sizes[k], -1)
            if all(grid.parts[i][0] in self.copies for i in others):
                for column in rows.unbind(1):  # copies of one place go together
                    self._put(ref, column)
            elif bool((rows == rows[:, :1]).all()) and len(torch.unique(rows[:, 0])) > 1:
                self._put(ref, rows[:, 0])

    def _mixes(self, node: Node, relations: Iterable[Relation]) -> str:
        """Why a node does not keep the channels apart; '' if it does."""
        covered: set[Ref] = set()
        for relation in relations:
            if isinstance(relation, Tie):
                covered |= {relation.a, relation.b}
                continue
            if isinstance(relation, Bundle):
                continue
            parts = [ref for ref, _ in relation.parts]
            if relation.merged in self.labels and not any(p in self.labels for p in parts):
                return "a view spreads them over several axes"
            covered |= {relation.merged, *parts}
        if divides(self.gm, node):
            for piece in node.users:
                for relation in self.seen.get(piece, ()):
                    covered |= {relation.a} if isinstance(relation, Tie) else set[Ref]()
        for near in (node, *node.all_input_nodes):
            for axis in range(len(shape(near) or ())):
                if (owner(near), axis) in self.labels and (owner(near), axis) not in covered:
                    return _reason(self.gm, node)
        return ""


def _reason(gm: GraphModule, node: Node) -> str:
    module = submodule(gm, node)
    if node.op == "output":
        return "they are an output of the model"
    if node.op == "placeholder":
        return "they are an input of the model"
    if isinstance(module, RowScale):
        return f"the branch {node.target} rescales rows by what depends on all of their columns"
    if isinstance(module, Branch):
        return (
            f"the branch {node.target} ({type(module).__name__}) does not say which axes of its "
            "tensors they are (Branch.axes)"
        )
    what = type(module).__name__ if module is not None else str(node.target)
    return f"{what} mixes them" if value(node) is not None else f"{what} has no recorded value"
