"""Which node of a graph belongs to which transformer block, by dataflow.

A block is what lies between two values of a residual stream, what else reads its parameters, and
what only it needs. No path may leave a block and come back, so that every block can be one call.
A block holds the regions that run on some of its tokens, which are calls inside of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from torch import Tag, nn
from torch.fx import GraphModule, Node

from ..api import Program
from ..branches.routing import TakeTokens
from ..edits.stream.region import stream_before, stream_behind
from ..errors import BlockError, PassError
from ..graph.aten import NORMS, attribute, inputs, is_op, submodule
from ..graph.flow import Flow, site_nodes
from ..graph.modes import MODES
from ..program.sites import SublayerSite
from ..program.state import BRANCHES
from .regions import Routing, routings


@dataclass(frozen=True, eq=False)
class Part:
    """One block of a graph, or a region of one.

    Attributes:
        label: the layers or sublayers that it holds, `s0.layer3`.
        path: its name as a module.
        home: the module whose parameters it reads itself, of a region its block's.
        order: what it computes, without stored tensors, in an order in which it can run.
        branch: of a region, path of the branch that chooses its tokens.
    """

    label: str
    path: str
    home: str
    order: tuple[Part | Node, ...]
    branch: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The regions in it."""
        return tuple(one for one in self.order if isinstance(one, Part))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What it computes, those of its regions included."""
        return _nodes(self.order)


def _nodes(order: Iterable[Part | Node]) -> tuple[Node, ...]:
    return tuple(n for one in order for n in (one.nodes if isinstance(one, Part) else (one,)))


def partition(program: Program) -> tuple[Part | Node, ...]:
    """The blocks of a program, and the nodes outside of them, in an order in which they can run.

    Raises:
        BlockError: there are no residual layers, the parameters of a layer have no module of
            their own, or a layer needs what is computed from its own values outside of it.
    """
    flow = Flow(program.module)
    sets, entries = _cores(program, flow)
    regions = _add_regions(program, flow, sets)
    paths = _paths(program, flow, sets)
    _add_readers(program, flow, sets, paths)
    starts = {label: min(places) for label, places in sets.items()}
    _add_exclusive(program, flow, sets, paths, entries)
    parts: dict[Part, int] = {}
    for label, path in paths.items():
        inner = _inner(program, flow, path, regions[label])
        parts[Part(label, path, path, _ordered(flow, sets[label], inner))] = starts[label]
    return _ordered(flow, range(len(flow.nodes)), parts)


def _cores(program: Program, flow: Flow) -> tuple[dict[str, set[int]], dict[str, int]]:
    """Layer -> what lies between the stream before and behind it, and what is before it, as bits.

    Layers that overlap (one within another, or of two streams that meet) are one.
    """
    nodes = site_nodes(program.module)
    layers: dict[str, dict[int, list[SublayerSite]]] = {}
    for site in program.sites:
        if isinstance(site, SublayerSite) and site.layer is not None:
            layers.setdefault(site.stream, {}).setdefault(site.layer, []).append(site)
    if not layers:
        raise BlockError(
            "this program has no blocks: it has no residual layers. program.sites shows what was "
            "found; train it as one module (program.module)."
        )
    cores: dict[str, set[int]] = {}
    before: dict[str, int] = {}
    for stream, members in layers.items():
        for layer, span in _spans(program, members, nodes).items():
            entry, end = (flow.index[n] for n in span)
            core = flow.carried(entry, end)
            label, core = f"{stream}.layer{layer}", flow.closed(core - {entry})
            above = flow.above([entry])
            for other in [k for k, s in cores.items() if s & core]:
                core, above = flow.closed(core | cores.pop(other)), above | before.pop(other)
                label = f"{other}+{label}"
            cores[label], before[label] = core, above
    return cores, before


def _spans(
    program: Program, layers: Mapping[int, list[SublayerSite]], nodes: Mapping[str, Node]
) -> dict[int, tuple[Node, Node]]:
    """The stream's values before and behind each layer of a stream."""
    order = {n: i for i, n in enumerate(program.module.graph.nodes)}
    chains = {
        layer: sorted(layers[layer], key=lambda s: order[nodes[s.nodes[1]]])
        for layer in sorted(layers)
    }
    try:
        entries = {
            k: _ungathered(program, stream_before(program, c[0], nodes)) for k, c in chains.items()
        }
        final = stream_behind(program, chains[max(chains)][-1], nodes)
    except PassError as error:
        raise BlockError(f"the blocks are not regular: {error}") from error
    ends: dict[int, Node] = {max(chains): final}
    for here, following in zip(chains, list(chains)[1:], strict=False):
        add, entry = nodes[chains[here][-1].nodes[1]], entries[following]
        normed = is_op(entry, NORMS) and inputs(entry)[0] is add
        ends[here] = entry if normed else add
    return {k: (entries[k], ends[k]) for k in chains}


def _ungathered(program: Program, node: Node) -> Node:
    gathers = isinstance(submodule(program.module, node), TakeTokens)
    return inputs(node)[0] if gathers else node


def _add_regions(
    program: Program, flow: Flow, sets: dict[str, set[int]]
) -> dict[str, list[Routing]]:
    """Takes into a layer the whole of each region in it: layer -> its regions.

    A region of several layers is no call; what it computes stays in their graphs.
    """
    by_block: dict[str, list[Routing]] = {label: [] for label in sets}
    for region in routings(program, flow):
        owners = [label for label, block in sets.items() if block & region.inside]
        if len(owners) == 1:
            sets[owners[0]] = flow.closed(sets[owners[0]] | region.around)
            by_block[owners[0]].append(region)
    return by_block


def _inner(program: Program, flow: Flow, path: str, regions: Sequence[Routing]) -> dict[Part, int]:
    """The regions of the block at `path`, with where they start."""
    taken = program.module.get_submodule(path)
    names = (name for i in count() if not hasattr(taken, name := f"region{i or ''}"))
    parents: dict[Part, int] = {}
    for region, name in zip(regions, names, strict=False):
        order = tuple(flow.nodes[i] for i in sorted(region.inside))
        part = Part(region.label, f"{path}.{name}", path, order, region.branch)
        parents[part] = min(region.inside)
    return parents


def _paths(program: Program, flow: Flow, sets: Mapping[str, set[int]]) -> dict[str, str]:
    """Layer -> the module that holds its own parameters, and none of another layer's."""
    gm = program.module
    own: dict[str, list[str]] = {label: [] for label in sets}
    for i, node in enumerate(flow.nodes):
        if not _is_parameter(gm, node) or str(node.target).startswith(f"{BRANCHES}."):
            continue
        users = _beyond_expressions(flow, i)
        readers = {k for k, s in sets.items() if users & s}
        if len(readers) == 1 and users <= sets[next(iter(readers))]:
            own[readers.pop()].append(str(node.target))
    paths = {label: _common(names) for label, names in own.items()}
    for label, path in paths.items():
        inside = [o for o, p in paths.items() if o != label and f"{p}.".startswith(f"{path}.")]
        if path and not inside:
            continue
        names = ", ".join(own[label][:3])
        what = (
            f"are in no module without those of others ({names}"
            f"{', ' + inside[0] if path else ''})" if own[label] else "are all shared with others"
        )  # fmt: skip
        raise BlockError(
            f"the blocks are not regular: the parameters of {label} {what}, so it cannot be a "
            "module of its own. Keep the program as one module (program.module)."
        )
    return paths


def _beyond_expressions(flow: Flow, stored: int) -> set[int]:
    """What reads a stored tensor, or an expression of it."""
    readers: set[int] = set()
    for i in flow.after[stored]:
        meta = flow.nodes[i].meta
        inner = "expression" in meta or "expressions" in meta
        readers |= _beyond_expressions(flow, i) if inner else {i}
    return readers


def _is_parameter(gm: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(attribute(gm, str(node.target)), nn.Parameter)


def _common(names: list[str]) -> str:
    """The module that all the named parameters are in."""
    split = [name.split(".")[:-1] for name in names]
    prefix: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


def _add_readers(
    program: Program, flow: Flow, sets: dict[str, set[int]], paths: Mapping[str, str]
) -> None:
    """Takes into a layer what it needs that else reads its parameters (T5's biases of scores)."""
    owners = {i: k for k, s in sets.items() for i in s}
    own: dict[str, list[int]] = {path: [] for path in paths.values()}
    for i, node in enumerate(flow.nodes):
        if _is_parameter(program.module, node):
            for path in _parents(str(node.target)):
                own.get(path, []).append(i)
    for label, path in paths.items():
        above = flow.above(sets[label])
        readers = {
            j for i in own[path] for j in flow.after[i] if j not in owners and above >> j & 1
        }
        if not readers:
            continue
        whole = flow.closed(sets[label] | flow.computed(readers))
        lost = sorted(i for i in whole if owners.get(i, label) != label)
        if lost:
            first = flow.nodes[min(readers)].name
            raise BlockError(
                f"the blocks are not regular: {label} ({path}) would hold {first}, which reads "
                f"its parameters, but {flow.nodes[lost[0]].name} of {owners[lost[0]]} lies "
                "between them. Keep the program as one module (program.module)."
            )
        sets[label] = whole
        owners |= dict.fromkeys(whole, label)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _add_exclusive(
    program: Program,
    flow: Flow,
    sets: dict[str, set[int]],
    paths: Mapping[str, str],
    before: Mapping[str, int],
) -> None:
    """Takes into a layer what only it needs: expressions of its weights, its part of masks.

    What the stream before it is computed from stays out, and so do other modules' parameters and
    everything random, whose order counts.
    """
    owners = {i: k for k, s in sets.items() for i in s}
    for i in sorted(flow.computed(range(len(flow.nodes))), reverse=True):
        users = {owners.get(j) for j in flow.after[i]}
        label = next(iter(users), None)
        if i in owners or len(users) != 1 or label is None or before[label] >> i & 1:
            continue
        if _is_random(flow.nodes[i]) or not _at_home(program.module, flow.nodes[i], paths[label]):
            continue
        sets[label].add(i)
        owners[i] = label


def _at_home(gm: GraphModule, node: Node, path: str) -> bool:
    """Whether a node reads no parameter of another module."""
    read = [str(n.target) for n in inputs(node) if _is_parameter(gm, n)]
    return all(name.startswith((f"{path}.", f"{BRANCHES}.")) for name in read)


def _is_random(node: Node) -> bool:
    if node.op == "call_module":
        return str(node.target).startswith(f"{MODES}.")
    return Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _ordered(
    flow: Flow, inside: Iterable[int], parts: Mapping[Part, int]
) -> tuple[Part | Node, ...]:
    """Parts and other nodes, each as soon as what it needs is there, else in graph order."""
    unit: dict[int, Part | Node] = {i: flow.nodes[i] for i in sorted(inside)}
    unit |= {flow.index[n]: part for part in parts for n in part.nodes}
    first = {one: i for i, one in unit.items()} | dict(parts)
    starts = {i: one for one, i in first.items()}
    needs: dict[Part | Node, set[Part | Node]] = {}
    for i, one in unit.items():
        before = {unit[j] for j in flow.before[i] if j in unit}
        needs.setdefault(one, set()).update(before - {one})
    order = _by_needs(first, starts, needs)
    _require_regular(needs)
    _require_draws_in_order(flow, order)
    return order


def _by_needs(
    first: Mapping[Part | Node, int], starts: Mapping[int, Part | Node],
    needs: Mapping[Part | Node, set[Part | Node]],
) -> tuple[Part | Node, ...]:  # fmt: skip
    """Kahn's topological order, the earliest of the graph first; empties `needs` on its way."""
    opens: dict[Part | Node, list[Part | Node]] = {}
    for one, needed in needs.items():
        for other in needed:
            opens.setdefault(other, []).append(one)
    ready = [first[one] for one, needed in needs.items() if not needed]
    heapq.heapify(ready)
    order: list[Part | Node] = []
    while ready:
        one = starts[heapq.heappop(ready)]
        order.append(one)
        for follower in opens.get(one, ()):
            needs[follower].discard(one)
            if not needs[follower]:
                heapq.heappush(ready, first[follower])
    return tuple(order)


def _require_regular(needs: Mapping[Part | Node, set[Part | Node]]) -> None:
    """Raises unless all could be put in order."""
    stuck = [one for one in needs if needs[one] and isinstance(one, Part)]
    if not stuck:
        return
    blocker = next(iter(needs[stuck[0]]))
    name = blocker.label if isinstance(blocker, Part) else blocker.name
    raise BlockError(
        f"the blocks are not regular: {stuck[0].label} ({stuck[0].path}) and {name} each need "
        "a value of the other, so neither can run first. Keep the program as one module "
        "(program.module)."
    )


def _require_draws_in_order(flow: Flow, order: Sequence[Part | Node]) -> None:
    """Raises if what draws random numbers would draw them in another order than the model."""
    draws = [n for n in _nodes(order) if _is_random(n)]
    for node, following in pairwise(draws):
        if flow.index[node] > flow.index[following]:
            raise BlockError(
                f"the blocks are not regular: {node.name} has to run before {following.name}, "
                "which draws random numbers before it in the model, so training would differ. "
                "Keep the program as one module (program.module)."
            )
