"""Where each site stands in a picture: the graph, cut at its residual adds.

A site is on the residual line of a stream (before its first add, between two, after the last), in
a branch that one sublayer adds to the line, or outside of all streams. Inside such a region the
boxes are ordered by dataflow. All of it follows from reachability; no name is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch.fx import Node

from ..rewriter.api import Program
from ..rewriter.graph.aten import SIZES, inputs, is_op
from ..rewriter.program.sites import Site
from .parts import Box, Lane, Layer, Line, Row, Stream, site_weight
from .repeats import MANY, merge


class _Map:
    """A captured graph, its residual adds, and the region of every site."""

    def __init__(self, program: Program, hits: frozenset[str]) -> None:
        self.hits = hits
        graph = program.module.graph
        self.nodes = {n.name: n for n in graph.nodes}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.sites = [s for s in program.sites if s.kind != "sublayer"]
        subs = program.sites.of("sublayer")
        self.rows: dict[Node, list[Site]] = {}
        for sub in sorted(subs, key=lambda s: self.order[self.nodes[s.nodes[1]]]):
            self.rows.setdefault(self.nodes[sub.nodes[1]], []).append(sub)
        self.stream = {add: row[0].stream for add, row in self.rows.items()}
        self.line: dict[Node, set[Node]] = {}
        self.branch: dict[str, set[Node]] = {}
        adds = set(self.rows)
        for add, row in self.rows.items():
            ends = {self.nodes[s.nodes[0]] for s in row}
            self.line[add] = self.above(set(inputs(add)) - ends, adds | ends)[0]
            for sub in row:
                end = self.nodes[sub.nodes[0]]
                self.branch[sub.id] = self.above({end}, adds)[0]
        self.place: dict[str, tuple[str, object]] = {s.id: self._place(s) for s in self.sites}
        self.owner: dict[Node, Site] = {}
        for site in self.sites:
            for node in self.of(site):
                if node not in self.owner or site_weight(site):
                    self.owner[node] = site

    def of(self, site: Site) -> list[Node]:
        return [self.nodes[n] for n in site.nodes]

    @staticmethod
    def above(start: Iterable[Node], stop: set[Node]) -> tuple[set[Node], set[Node]]:
        """(nodes that `start` is computed from, the nodes of `stop` where the walk ended)."""
        seen: set[Node] = set()
        met: set[Node] = set()
        stack = list(start)
        while stack:
            node = stack.pop()
            if node in stop:
                met.add(node)
            elif node not in seen and node.op != "get_attr" and not is_op(node, SIZES):
                seen.add(node)
                stack.extend(inputs(node))
        return seen, met

    def _place(self, site: Site) -> tuple[str, object]:
        """`line` of an add, `branch` of a sublayer, `row` (shared by its lanes), `aside` or
        `after` of a stream, or `outside`."""
        nodes = set(self.of(site))
        for add, line in self.line.items():
            if nodes & line:
                return "line", add
        claims = [s for row in self.rows.values() for s in row if nodes & self.branch[s.id]]
        met = self.above([i for n in nodes for i in inputs(n)], set(self.rows))[1]
        last = max(met, key=lambda n: self.order[n], default=None)
        if not claims:
            return ("after", self.stream[last]) if last else ("outside", "")
        layers = {(s.stream, s.layer) for s in claims}
        own_line = self.line[self.nodes[claims[0].nodes[1]]]
        foreign = self.above([i for n in nodes for i in inputs(n)], set(self.rows) | own_line)[1]
        leaves = all(self.stream.get(m, claims[0].stream) != claims[0].stream for m in foreign)
        if last and leaves and (site.kind == "norm" or len(layers) > 1):
            return "after", self.stream[last]
        own = [s for s in claims if (s.stream, s.layer) == (site.stream, site.layer)]
        if len(layers) > 1 and not own:
            return "aside", claims[0].stream
        first = own[0] if own else claims[0]
        add = self.nodes[first.nodes[1]]
        every = len(self.rows[add]) > 1 and set(self.rows[add]) <= set(claims)
        return ("row", add) if every else ("branch", first.id)

    def at(self, kind: str, where: object) -> list[Site]:
        return [s for s in self.sites if self.place[s.id] == (kind, where)]

    def boxes(self, sites: Sequence[Site], stream: str, line: set[Node] | None = None) -> list[Box]:
        """The boxes of a region and how they read each other, by dataflow."""
        grouped: dict[object, list[Site]] = {}
        for site in sites:
            key: object = site.id
            if getattr(site, "features", None) is not None:
                key = site.nodes, site_weight(site)
            grouped.setdefault(key, []).append(site)
        boxes = [Box(tuple(group)) for group in grouped.values()]
        home = {site.id: box for box in boxes for site in box.sites}
        carriers = {n: home[s.id] for n, s in self.owner.items() if s.id in home}
        operators: list[Box] = []
        labels: dict[str, Box] = {}
        for box in boxes:
            nodes = [n for s in box.sites for n in self.of(s)]
            if all(carriers.get(n) not in (box, None) for n in nodes):
                operators.append(box)
                continue
            origins: set[str] = set()
            for node in self._readers(nodes, carriers, box, line or set(), stream, origins):
                parent = carriers[node]
                if parent not in box.parents:
                    box.parents.append(parent)
            if box.parents and box.sites[0].kind == "attention":
                box.fed = False  # no more than the size of its mask comes from the line
            if not box.parents and not box.fed:
                for origin in sorted(origins)[:MANY]:
                    box.parents.append(labels.setdefault(origin, Box(label=origin)))
        for box in operators:  # an activation stands right before the weight that reads it
            below = carriers[self.nodes[box.sites[0].nodes[0]]]
            box.parents, below.parents = _nearest(below.parents), [box]
            boxes.remove(box)
            boxes.insert(boxes.index(below), box)
        return merge(_levels([*labels.values(), *boxes]), self.hits)

    def _readers(
        self, nodes: list[Node], carriers: Mapping[Node, Box], box: Box, line: set[Node],
        stream: str, origins: set[str],
    ) -> Iterator[Node]:  # fmt: skip
        """The nodes of other boxes that `box` reads; notes in `origins` what lies further up."""
        seen: set[Node] = set()
        stack = [i for n in nodes for i in inputs(n)]
        while stack:
            node = stack.pop()
            if node in seen or is_op(node, SIZES):
                continue
            seen.add(node)
            if node in carriers:
                if carriers[node] is not box:
                    yield node
                    continue
            elif node in line or self.stream.get(node) == stream:
                box.fed = True
                continue
            elif node in self.stream:
                origins.add(f"from stream {self.stream[node]}")
                continue
            elif node in self.owner:
                kind, where = self.place[self.owner[node].id]
                if kind == "row":
                    continue
                where = self.stream[where] if isinstance(where, Node) else where
                shared = kind not in ("after", "line") or where == stream
                name = ".".join(self.owner[node].module.split(".")[-2:])
                origins.add(f"from {name if shared else f'stream {where}'}")
                continue
            elif node.op == "placeholder":
                origins.add(f"input: {node.target}")
            stack.extend(inputs(node))


def _nearest(boxes: list[Box]) -> list[Box]:
    """`boxes` without those that another one of them reads, however indirectly."""
    above: set[int] = set()
    stack = [p for b in boxes for p in b.parents]
    while stack:
        box = stack.pop()
        if id(box) not in above:
            above.add(id(box))
            stack += box.parents
    return [b for b in boxes if id(b) not in above]


def _levels(boxes: list[Box]) -> list[Box]:
    for box in boxes:
        box.level = max((p.level + 1 for p in box.parents), default=0)
    _late(boxes)
    return boxes


def _late(boxes: list[Box]) -> None:
    """Puts boxes that read nothing beside those that the same boxes read."""
    last = max((b.level for b in boxes), default=0)
    for box in boxes:
        if box.sites and not box.parents and not box.fed:
            readers = [b.level - 1 for b in boxes if box in b.parents]
            box.level = min(readers, default=last)


def streams(program: Program, hits: frozenset[str]) -> tuple[list[Stream], Line]:
    """All streams in the order of their first add, and what is outside of them; boxes that
    differ in numbers only are one, but for those of which `hits` names some."""
    map_ = _Map(program, hits)
    all_streams: list[Stream] = []
    for name in dict.fromkeys(map_.stream.values()):
        adds = [add for add, stream in map_.stream.items() if stream == name]
        lines = [map_.boxes(map_.at("line", add), name) for add in adds]
        before = Line(lines[0], map_.boxes(map_.at("aside", name), name))
        after = map_.boxes(map_.at("after", name), name, set())
        layers: list[Layer] = []
        for add, following in zip(adds, [*lines[1:], []], strict=True):
            row = map_.rows[add]
            lanes = [
                Lane(Box((s,)), map_.boxes(map_.at("branch", s.id), name, map_.line[add]))
                for s in row
            ]
            number = row[0].layer or 0
            if not layers or layers[-1].numbers != [number]:
                layers.append(Layer([number], []))
            shared = map_.boxes(map_.at("row", add), name, map_.line[add])
            layers[-1].steps.append(Row(shared, lanes))
            if following:
                layers[-1].steps.append(Line(following))
        if any(lines[1:]) and after and after[0].sites[:1] and after[0].sites[0].kind == "norm":
            # Where norms follow the adds, so does the last one.
            layers[-1].steps.append(Line([after.pop(0)]))
            for box in after:
                box.parents = [p for p in box.parents if p in after]
            _levels(after)
        all_streams.append(Stream(name, before, layers, Line(after)))
    return all_streams, Line(map_.boxes(map_.at("outside", ""), ""))
