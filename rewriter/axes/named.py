"""Named axes of every value of a program, and of every stored tensor, found by dataflow.

What is known to begin with: samples and tokens of the inputs, heads and widths at attentions, the
width of embeddings and sublayers, the inner channels of feed-forward blocks, experts. From there it
goes both ways through what operators do (`steps`). Sizes are compared only where a view parts or
merges axes, so values that happen to be equal say nothing. Convolutions come last: whatever else
is not known along their axes is channels and pixels.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.fx import Node

from ..branches.branch import Branch
from ..branches.samples import Order
from ..branches.shapes import ExpertsShape
from ..graph.aten import CONVS, is_op, named_arguments, placeholders, submodule
from ..inputs.axes import KINDS as INPUT_KINDS
from ..inputs.spec import InputSpec
from ..program.sites import (
    AttentionSite,
    EmbeddingSite,
    ExpertsSite,
    FeedForwardSite,
    LinearSite,
    Site,
    SublayerSite,
)
from ..program.state import State
from .attended import attended
from .kinds import KINDS, Axis, Factor, Kind, axis, joined, known, merged, piece, split, whole, word
from .relation import Ref, owner, sizes_of
from .step import Made, Product, Row, Same, Step, size_at
from .steps import steps
from .views import copies

_DECLARED: Mapping[str, Kind] = {"rank": "rank", "batch": "batch", "tokens": "token"}


InputKinds = Mapping[str, Mapping[int, Kind]]
"""Name of an input -> axis -> what lies along it."""


class NamedAxes:
    """What lies along the axes of a program's values and stored tensors, as far as it is known.

    Values that an edit adds later are looked at when they are asked for; what was known before
    stays.
    """

    def __init__(self, flow: _Flow) -> None:
        self._flow = flow

    def of(self, value: Node | str) -> tuple[Axis | None, ...]:
        """The axes of a node's value, or of a stored tensor by its name."""
        source = owner(value) if isinstance(value, Node) else value
        self._flow.look(source)
        return tuple(self._flow.found.get((source, k)) for k in range(len(self._sizes(source))))

    def words(self, value: Node | str) -> tuple[str, ...]:
        """The same as text: `("batch", "token", "head*width")`, `1` for axes of that size, and `?`
        where it is not known."""
        source = owner(value) if isinstance(value, Node) else value
        pairs = zip(self._sizes(source), self.of(value), strict=True)
        return tuple("1" if str(size) == "1" else word(along) for size, along in pairs)

    def place(self, value: Node | str, kind: Kind) -> int | None:
        """The only axis of a value along which just this kind lies; None if there is none, or
        there are several."""
        places = [k for k, text in enumerate(self.words(value)) if text == kind]
        return places[0] if len(places) == 1 else None

    def within(self, value: Node | str, kind: Kind) -> tuple[int, Order] | None:
        """The only axis along which a kind lies, alone or in a product, and how; None if there is
        none, there are several, or it is between other factors."""
        kinds = [[f.kind for f in along or ()] for along in self.of(value)]
        places = [k for k, of_axis in enumerate(kinds) if kind in of_axis]
        if len(places) != 1 or kinds[places[0]].count(kind) != 1:
            return None
        place, of_axis = places[0], kinds[places[0]]
        if len(of_axis) == 1:
            return place, "alone"
        if kind in (of_axis[0], of_axis[-1]):
            return place, "slow" if of_axis[0] == kind else "fast"
        return None

    def only(self, begin: Iterable[Ref]) -> NamedAxes:
        """Where that lies which lies along some axes, as `token`; of others nothing is known."""
        return NamedAxes(self._flow.only(begin))

    def _sizes(self, source: Node | str) -> tuple[Any, ...]:
        return self._flow.sizes[source] if isinstance(source, str) else sizes_of(source)


def named_axes(program: State, inputs: InputKinds | None = None) -> NamedAxes:
    """What lies along the axes of a program's values.

    Args:
        program: only read.
        inputs: what lies along the axes of its inputs; by default, what its spec calls them.
    """
    flow = _Flow(program, inputs)
    flow.run()
    return NamedAxes(flow)


def kinds_of_inputs(spec: InputSpec) -> InputKinds:
    """What a spec calls the dynamic axes of its inputs."""
    kinds: dict[int | str, Kind] = {n: kind for kind in INPUT_KINDS for n in spec.of_kind(kind)}
    return {i.name: {k: kinds[s] for k, s in enumerate(i.shape) if s in kinds} for i in spec.inputs}


class _Flow:
    """One run of the analysis."""

    def __init__(self, program: State, inputs: InputKinds | None) -> None:
        self.program, self.inputs = program, inputs
        self.gm = program.module
        self.found: dict[Ref, Axis] = {}
        self.refused: set[Ref] = set()
        self.copies: set[Ref] = set()
        self.near: dict[Ref, list[Step]] = {}
        self.queue: deque[Step] = deque()
        self.waiting: set[Step] = set()
        self.nodes = {n.name: n for n in self.gm.graph.nodes}
        stored = (*self.gm.named_parameters(), *self.gm.named_buffers())
        self.sizes = {n: tuple(t.shape) for n, t in stored}
        self.seen: set[Node] = set()
        for node in self.gm.graph.nodes:
            self._read(node)

    def _read(self, node: Node) -> list[Step]:
        """What a node says, from now on."""
        self.seen.add(node)
        said = steps(self.gm, node)
        for step in said:
            for ref in _refs(step):
                self.near.setdefault(ref, []).append(step)
        self.copies.update(copies(node))
        return said

    def only(self, begin: Iterable[Ref]) -> _Flow:
        """The same graph, of which nothing is known but that some axes hold one thing."""
        flow = copy.copy(self)
        flow.found, flow.refused, flow.waiting, flow.queue = {}, set(), set(), deque()
        flow.seen, flow.copies = set(self.seen), set(self.copies)
        flow.near = {ref: [*said] for ref, said in self.near.items()}
        for ref in begin:
            flow._put(ref, axis("token", flow._size(ref)))
        flow._spread()
        return flow

    def look(self, source: Node | str) -> None:
        """Looks at a value that was not there when the analysis ran."""
        stack = [source] if isinstance(source, Node) else []
        fresh: set[Node] = set()
        while stack:
            node = stack.pop()
            if node not in self.seen and node not in fresh:
                fresh.add(node)
                stack += node.all_input_nodes
        for node in sorted(fresh):
            self.queue.extend(self._read(node))
        self._spread()

    def run(self) -> None:
        """Finds what lies along every axis."""
        for source in self._inputs(), self._sites(), self._branches():
            for ref, factors in source:
                self._put(ref, factors)
        self._spread()
        for ref, factors in self._stacked():
            self._put(ref, factors)
        self._spread()
        for ref, kind in self._convolutions():
            if ref not in self.found:
                self._put(ref, axis(kind, self._size(ref)))
        self._spread()

    def _spread(self) -> None:
        while self.queue:
            step = self.queue.popleft()
            self.waiting.discard(step)
            self._apply(step)

    def _size(self, ref: Ref) -> object:
        return size_at(ref, self.sizes)

    def _put(self, ref: Ref, factors: Axis | None) -> None:
        if factors is None or not known(factors) or ref in self.refused:
            return
        old = self.found.get(ref)
        new = factors if old is None else joined(old, factors)
        if new == old:
            return
        if new is None:  # two things meet here: neither is what it is
            self.refused.add(ref)
            self.found.pop(ref)
            return
        self.found[ref] = new
        for step in self.near.get(ref, ()):
            if step not in self.waiting:
                self.waiting.add(step)
                self.queue.append(step)

    def _apply(self, step: Step) -> None:
        match step:
            case Same(a, b):
                self._put(b, self.found.get(a))
                self._put(a, self.found.get(b))
            case Made(a, b, size, start):
                source = self.found.get(a)
                if str(size) not in ("0", "1"):
                    self._put(b, piece(source, start, size) if source is not None else None)
            case Row(name, size, pieces):
                self._put(name, whole([self.found.get(p) for p in pieces], size))
            case Product():
                self._product(step)

    def _product(self, step: Product) -> None:
        refs, sizes = [r for r, _ in step.parts], [s for _, s in step.parts]
        copies = [r in step.copies or r in self.copies for r in refs]
        merged_axis = self.found.get(step.merged)
        if merged_axis == axis("head", _total(sizes)) and copies == [False, True]:
            # Heads that are copies of fewer are as many groups.
            self._put(refs[0], axis("group", sizes[0]))
            self._put(step.merged, (*axis("group", sizes[0]), *axis("head", sizes[1])))
        elif merged_axis is not None:
            for ref, part in zip(refs, split(merged_axis, sizes), strict=True):
                self._put(ref, part)
        self._put(step.merged, merged([self.found.get(r) for r in refs], sizes))

    # Where it begins.

    def _inputs(self) -> Iterator[tuple[Ref, Axis]]:
        source = placeholders(self.gm)
        for name, kinds in (self.inputs or kinds_of_inputs(self.program.spec)).items():
            for place, kind in kinds.items():
                yield (source[name], place), axis(kind, self._size((source[name], place)))

    def _branches(self) -> Iterator[tuple[Ref, Axis]]:
        for node in self.gm.graph.nodes:
            module = submodule(self.gm, node)
            if not isinstance(module, Branch):
                continue
            for name, labels in module.axes.items():
                ref = f"{node.target}.{name}"
                shape = self.sizes.get(ref, ())
                if len(shape) == len(labels) + 1 and isinstance(module.shape, ExpertsShape):
                    labels = ("expert", *labels)
                if len(shape) == len(labels):
                    for place, label in enumerate(labels):
                        yield (ref, place), _declared(label, shape[place], module)

    def _sites(self) -> Iterator[tuple[Ref, Axis]]:
        seeds: list[tuple[Ref, Kind]] = []
        for site in self.program.sites:
            nodes = [self.nodes[n] for n in site.nodes if n in self.nodes]
            if nodes:
                seeds += self._at(site, nodes)
        for ref, kind in seeds:
            if isinstance(ref[0], str) and ref[0] not in self.sizes:
                continue  # stored in parts
            size = self._size(ref)
            if size != 1:
                yield ref, axis(kind, size)

    def _at(self, site: Site, nodes: list[Node]) -> list[tuple[Ref, Kind]]:
        """What is known at a site."""
        node = nodes[0]
        if isinstance(site, AttentionSite):
            return attended(node, self.gm)
        if isinstance(site, EmbeddingSite) and site.role != "relative":
            table = site.weight if site.weight in self.sizes else node  # or it is stored in parts
            return [((table, len(sizes_of(node)) - 1 if table is node else 1), "width")]
        if isinstance(site, SublayerSite):
            place, kind = (1, "channel") if site.role == "conv" else (-1, "width")
            rank = len(sizes_of(node))
            return [((node, place % rank), kind)] if rank > 2 else []
        if isinstance(site, ExpertsSite):
            return [((site.weight, site.place), "expert")]
        if isinstance(site, FeedForwardSite):
            return self._feed_forward(site)
        return []

    def _feed_forward(self, site: FeedForwardSite) -> list[tuple[Ref, Kind]]:
        named: list[tuple[Ref, Kind]] = []
        down = self.program.sites[site.down]
        if isinstance(down, LinearSite) and not down.sliced:
            named.append(((down.weight, 0 if down.in_out else 1), "channel"))
        elif isinstance(down, ExpertsSite):
            named.append(((down.weight, down.axes[1]), "channel"))
        router = self.program.sites[site.router] if site.router else None
        if isinstance(router, LinearSite):
            named.append(((router.weight, 1 if router.in_out else 0), "expert"))
        return named

    def _stacked(self) -> Iterator[tuple[Ref, Axis]]:
        """Attentions that have samples and heads on one axis."""
        cores = [s.nodes[0] for s in self.program.sites if isinstance(s, AttentionSite)]
        for name in cores:
            match self.found.get((self.nodes[name], 0)) if name in self.nodes else None:
                case (Factor("batch") as rows, Factor(None, size)):
                    yield (self.nodes[name], 0), (rows, *axis("head", size))
                case _:
                    pass

    def _convolutions(self) -> Iterator[tuple[Ref, Kind]]:
        for node in self.gm.graph.nodes:
            if not is_op(node, CONVS):
                continue
            for value in (named_arguments(node)["input"], node):
                for place in range(1, len(sizes_of(value))):
                    ref: Ref = owner(value), place
                    if self._size(ref) != 1 and ref not in self.refused:
                        yield ref, "token" if place > 1 else "channel"


def _declared(label: str | tuple[str, ...], size: int, branch: Branch) -> Axis:
    """What a branch says of an axis; beside a stack of matrices, it has one part for each."""
    words = (label,) if isinstance(label, str) else label
    kinds: list[Kind | None]
    kinds = [_DECLARED.get(w) or next((k for k in KINDS if k == w), None) for w in words]
    count = branch.shape.count
    joint = isinstance(branch.shape, ExpertsShape) and kinds != ["expert"] and len(kinds) == 1
    if joint and kinds[0] is None and size % count == 0:
        return *axis("expert", count), *axis(kinds[0], size // count)
    return axis(kinds[0], size) if len(kinds) == 1 else axis(None, size)


def _refs(step: Step) -> tuple[Ref, ...]:
    match step:
        case Same(a, b) | Made(a, b):
            return a, b
        case Row(name, _, pieces):
            return name, *pieces
        case Product(name, parts):
            return name, *(r for r, _ in parts)


def _total(sizes: list[object]) -> object:
    total: object = 1
    for size in sizes:
        total = total * size  # pyright: ignore
    return total
