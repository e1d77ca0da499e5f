"""Finds the sites of a canonical graph by dataflow, with no table of model names.

Residual sums come first (`residual`): what lies between a stream's value and what is added to it
is a sublayer. Its contents say what it is: an attention (`attention`), a feed-forward block,
experts, a mixer or convolutions (`blocks`). Streams are chains of residual sums, and layers are
the blocks that repeat along them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.aten import SLICES, is_op, shape
from ..program.site_table import Sites
from .attention import Core, cores, outputs, projections, shares_source
from .build import build
from .evaluation import Probe
from .residual import Residual, ResidualBranch, Streams, Sublayer, channels_last, number, residuals
from .sublayers import Draft, Part, beside, ends, feed_forward, mixer, router
from .walk import Linear, Walk


def discover(
    gm: GraphModule, aliases: Mapping[str, str], sample: Mapping[str, Tensor],
    read: set[str] | None = None,
) -> Sites:  # fmt: skip
    """Finds all sites of a canonical captured graph.

    Args:
        gm: the graph, in canonical form with modes restored.
        aliases: tied names -> the canonical name.
        sample: example inputs, which probes read where a value depends on them (masks).
        read: gets the names of the inputs and stored tensors whose values the sites depend on.
    """
    graph = Walk(gm)
    probe = Probe(gm, sample, [*graph.linears, *graph.convs], graph.writers)
    discovery = _Discovery(graph, probe, cores(graph))
    discovery.run()
    sites = build(graph, probe, aliases, discovery)
    if read is not None:
        read |= probe.read
    return sites


@dataclass
class _Discovery:
    """Classifies every branch, innermost first, and remembers what is taken."""

    graph: Walk
    probe: Probe
    cores: list[Core]
    drafts: list[Draft] = field(default_factory=list[Draft])
    sublayers: list[Sublayer] = field(default_factory=list[Sublayer])
    roles: dict[Node, str] = field(default_factory=dict[Node, str])
    others: list[Part] = field(default_factory=list[Part])
    taken: set[Node] = field(default_factory=set[Node])
    owner: dict[Node, Sublayer] = field(default_factory=dict[Node, Sublayer])

    def __post_init__(self) -> None:
        self.streams = Streams(self.graph)

    def run(self) -> None:
        for residual in residuals(self.graph):
            stream = self.streams.place(residual)
            for sub in self._sublayers(residual):
                sub.stream = stream
                self.sublayers.append(sub)
        for core in self.cores:
            if core.node not in self.taken and (draft := self._attention(core, None)):
                self.drafts.append(draft)
        number(self.graph, self.sublayers)

    def _sublayers(self, residual: Residual) -> Iterator[Sublayer]:
        """The sublayers of one sum; experts and what is added to their output are one."""
        groups: dict[Node, list[tuple[ResidualBranch, str, list[Draft]]]] = {}
        for branch in residual.branches:
            if known := self._classify(branch):
                groups.setdefault(branch.group, []).append((branch, *known))
        by_branch: list[tuple[ResidualBranch, str, list[Draft]]] = []
        for group, members in groups.items():
            if len(members) > 1 and {kind for _, kind, _ in members} == {"ffn"}:
                first = members[0][0]
                nodes = [n for branch, *_ in members for n in branch.nodes]
                whole = ResidualBranch(first.root, group, first.add, nodes, group)
                self._shared(members)
                by_branch.append((whole, "ffn", [d for *_, drafts in members for d in drafts]))
            else:
                by_branch.extend(members)
        for branch, kind, drafts in by_branch:
            output = channels_last(branch) if drafts else branch.output
            sub = Sublayer(kind, branch, len(by_branch) > 1, output)
            for draft in drafts:
                draft.sublayer = sub
            self.drafts.extend(drafts)
            for node in branch.nodes:
                self.owner.setdefault(node, sub)
            yield sub

    def _shared(self, members: list[tuple[ResidualBranch, str, list[Draft]]]) -> None:
        """Marks the gates of dense blocks that stand beside experts."""
        for branch, _, drafts in members:
            if not any(d.experts for d in drafts):
                for node in branch.nodes:
                    if node in self.graph.linears and self.graph.linears[node].sizes[1] == 1:
                        self.roles[node] = "router.shared"

    def _classify(self, branch: ResidualBranch) -> tuple[str, list[Draft]] | None:
        inside = self._own(branch)
        nested = any(n in self.taken for n in inside if self.graph.weighted(n))
        nodes = inside - self.taken
        self.taken |= nodes
        within = [c for c in self.cores if c.node in nodes]
        drafts = [d for c in within if (d := self._attention(c, branch))]
        if drafts:
            return ("cross" if drafts[0].cross else "attn"), drafts
        shared = [c for c in self.cores if c.node in inside]
        joint = [o for c in shared for o in outputs(self.graph, c, nodes)]
        if joint:  # one attention that writes to two streams
            self.roles[joint[0].node] = "o"
            return "attn", []
        linears = [p for n, p in self.graph.linears.items() if n in nodes]
        width = (shape(branch.add) or (0,))[-1]
        for down in ends(self.graph, branch.output, nodes):
            draft = feed_forward(self.graph, self.probe, down, nodes, width)
            if draft is not None:
                self._routers(draft, linears)
                return "ffn", [draft]
        if shared or nested or any(p.stack for p in linears):
            return None
        draft = mixer(self.graph, branch.output, linears, nodes)
        if draft is not None:
            return "mixer", [draft]
        convs = [n for n in branch.nodes if n in self.graph.convs]
        return ("conv", []) if convs and not linears else None

    def _own(self, branch: ResidualBranch) -> set[Node]:
        """The nodes of a branch; behind a sum of the same stream, where the branch starts from that
        (`x + mixer(x + attention(x))`)."""
        inside = set(branch.nodes)
        sums = [
            s.branch.add for s in self.sublayers
            if s.branch.root is branch.root and s.branch.add in inside
        ]  # fmt: skip
        return set(self.graph.between(sums[-1], branch.output)) if sums else inside

    def _routers(self, draft: Draft, linears: list[Linear]) -> None:
        parts = {id(p) for group in draft.parts.values() for p in group}
        for linear in linears:
            if id(linear) not in parts and router(self.graph, linear):
                self.roles[linear.node] = "router"

    def _attention(self, core: Core, branch: ResidualBranch | None) -> Draft | None:
        graph = self.graph
        parts = projections(graph, core)
        if parts is None:
            return None
        parts["o"] = outputs(graph, core, branch.nodes if branch else graph.nodes)
        q, k = parts["q"][0], parts["k"][0]
        draft = Draft("attn", parts, core=core, cross=not self._alike(q, k, branch))
        owners = [p.node for role in "qkv" for p in parts[role]]
        for role, operand in (("q", core.q), ("k", core.k), ("v", core.v)):
            for linear in parts[role]:
                if owners.count(linear.node) > 1 or self._sliced(linear.node, operand):
                    features = self.probe.features(linear.node, operand)
                else:
                    features = tuple(range(linear.sizes[1]))
                if linear.rows is not None:
                    draft.features[role, linear.weight] = tuple(linear.rows[i] for i in features)
                elif len(features) < linear.sizes[1]:
                    draft.features[role, linear.weight] = features
            # The projection that gives most of a role's features stands for it.
            parts[role].sort(
                key=lambda p, r=role: -len(draft.features.get((r, p.weight), range(p.sizes[1])))
            )
        self.others += beside(graph, self.probe, draft, core)
        return draft

    def _alike(self, q: Linear, k: Linear, branch: ResidualBranch | None) -> bool:
        """Whether keys are computed from the tokens that the queries are computed from, maybe in an
        earlier layer."""
        inside = set(branch.nodes) if branch else set[Node]()
        if branch is None or q.node not in inside:
            return shares_source(self.graph, q, k)
        if k.node in inside:
            return True
        stream = self.streams.of.get(branch.add)
        lender = self.owner.get(k.node)
        return (lender.stream if lender else self.streams.above(k.x)) == stream

    def _sliced(self, top: Node, bottom: Node) -> bool:
        return any(is_op(n, SLICES) for n in self.graph.between(top, bottom))
