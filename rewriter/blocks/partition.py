"""Which node of a graph belongs to which transformer block, by dataflow.

A block is what lies between two values of a residual stream, what else reads its parameters, and
what only it needs. No path may leave a block and come back, so that every block can be one call.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tag, nn
from torch.fx import GraphModule, Node

from ..aten import NORMS, SIZES, attribute, inputs, is_op, written
from ..capture.modes import MODES
from ..edits.compose import site_nodes
from ..edits.region import stream_before, stream_behind
from ..errors import BlockError, PassError
from ..program import BRANCHES, Program
from ..sites.sites import SublayerSite

_NOT_COMPUTED = ("placeholder", "get_attr", "output")


@dataclass(frozen=True, eq=False)
class Part:
    """One block of a graph.

    Attributes:
        label: the layers that it holds, `s0.layer3`.
        path: the module whose parameters are its own.
        nodes: what it computes, in graph order, without stored tensors.
    """

    label: str
    path: str
    nodes: tuple[Node, ...]


def partition(program: Program) -> tuple[Part | Node, ...]:
    """The blocks of a program, and the nodes outside of them, in an order in which they can run.

    Raises:
        BlockError: there are no residual layers, the parameters of a layer have no module of
            their own, or a layer needs what is computed from its own values outside of it.
    """
    flow = _Flow(program.module)
    sets, entries = _cores(program, flow)
    paths = _paths(program, flow, sets)
    _add_readers(program, flow, sets, paths)
    starts = {label: min(found) for label, found in sets.items()}
    _add_exclusive(program, flow, sets, paths, entries)
    parts = {
        Part(k, paths[k], tuple(flow.nodes[i] for i in sorted(s))): starts[k]
        for k, s in sets.items()
    }
    return _ordered(flow, parts)


class _Flow:
    """What every node needs to have run before it, in-place writes included, by graph position."""

    def __init__(self, gm: GraphModule) -> None:
        self.nodes: list[Node] = list(gm.graph.nodes)
        self.index = {n: i for i, n in enumerate(self.nodes)}
        self.before: list[set[int]] = [set() for _ in self.nodes]
        self.after: list[set[int]] = [set() for _ in self.nodes]
        writers: dict[Node, list[int]] = {}
        for i, node in enumerate(self.nodes):
            target = written(node)
            needed = [self.index[s] for s in inputs(node)]
            for source in (*inputs(node), *([target] if target else ())):
                needed += writers.get(source, ())
            if target is not None:
                needed += [self.index[r] for r in target.users if self.index[r] < i]
                writers.setdefault(target, []).append(i)
            for j in set(needed):
                self.before[i].add(j)
                self.after[j].add(i)

    def computed(self, found: Iterable[int]) -> set[int]:
        """Without inputs, outputs and stored tensors."""
        return {i for i in found if self.nodes[i].op not in _NOT_COMPUTED}

    def below(self, start: Iterable[int]) -> set[int]:
        """What needs any of `start`, `start` included."""
        return _reach(start, self.after.__getitem__)

    def above(self, start: Iterable[int]) -> set[int]:
        """What any of `start` needs, `start` included."""
        return _reach(start, self.before.__getitem__)

    def carried(self, start: int) -> set[int]:
        """What needs more of `start` than its size."""
        return _reach(
            [start], lambda i: (j for j in self.after[i] if not is_op(self.nodes[j], SIZES))
        )

    def closed(self, found: set[int]) -> set[int]:
        """`found` and all that is computed on the way from one of it to another."""
        return self.computed(self.below(found) & self.above(found))


def _reach(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> set[int]:
    found = set(start)
    stack = list(found)
    while stack:
        fresh = [j for j in step(stack.pop()) if j not in found]
        found.update(fresh)
        stack += fresh
    return found


def _cores(program: Program, flow: _Flow) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Layer -> what lies between the stream before and behind it, and what is before it.

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
    found: dict[str, set[int]] = {}
    before: dict[str, set[int]] = {}
    for stream, members in layers.items():
        for layer, span in _spans(program, members, nodes).items():
            entry, end = (flow.index[n] for n in span)
            core = flow.carried(entry) & flow.above([end])
            label, core = f"{stream}.layer{layer}", flow.closed(core - {entry})
            above = flow.above([entry])
            for other in [k for k, s in found.items() if s & core]:
                core, above = flow.closed(core | found.pop(other)), above | before.pop(other)
                label = f"{other}+{label}"
            found[label], before[label] = core, above
    return found, before


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
        entries = {k: stream_before(program, c[0], nodes) for k, c in chains.items()}
        final = stream_behind(program, chains[max(chains)][-1], nodes)
    except PassError as error:
        raise BlockError(f"the blocks are not regular: {error}") from error
    ends: dict[int, Node] = {max(chains): final}
    for here, following in zip(chains, list(chains)[1:], strict=False):
        add, entry = nodes[chains[here][-1].nodes[1]], entries[following]
        normed = is_op(entry, NORMS) and inputs(entry)[0] is add
        ends[here] = entry if normed else add
    return {k: (entries[k], ends[k]) for k in chains}


def _paths(program: Program, flow: _Flow, sets: Mapping[str, set[int]]) -> dict[str, str]:
    """Layer -> the module that holds its own parameters, and none of another layer's."""
    gm = program.module
    own: dict[str, list[str]] = {label: [] for label in sets}
    for i, node in enumerate(flow.nodes):
        if not _is_parameter(gm, node) or str(node.target).startswith(f"{BRANCHES}."):
            continue
        readers = {k for k, s in sets.items() if flow.after[i] & s}
        if len(readers) == 1 and flow.after[i] <= sets[next(iter(readers))]:
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
            "module of its own. Train the program as one module (program.module)."
        )
    return paths


def _is_parameter(gm: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(attribute(gm, str(node.target)), nn.Parameter)


def _common(names: list[str]) -> str:
    """The module that all the named parameters are in."""
    split = [name.split(".")[:-1] for name in names]
    found: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return ".".join(found)


def _add_readers(
    program: Program, flow: _Flow, sets: dict[str, set[int]], paths: Mapping[str, str]
) -> None:
    """Takes into a layer what it needs that else reads its parameters (T5's biases of scores)."""
    for label, path in paths.items():
        owners = {i: k for k, s in sets.items() for i in s}
        readers = {
            j
            for i, node in enumerate(flow.nodes)
            if _is_parameter(program.module, node) and str(node.target).startswith(f"{path}.")
            for j in flow.after[i]
            if j not in owners
        } & flow.above(sets[label])
        if not readers:
            continue
        whole = flow.closed(sets[label] | flow.computed(readers))
        lost = sorted(i for i in whole if owners.get(i, label) != label)
        if lost:
            first = flow.nodes[min(readers)].name
            raise BlockError(
                f"the blocks are not regular: {label} ({path}) would hold {first}, which reads "
                f"its parameters, but {flow.nodes[lost[0]].name} of {owners[lost[0]]} lies "
                "between them. Train the program as one module (program.module)."
            )
        sets[label] = whole


def _add_exclusive(
    program: Program,
    flow: _Flow,
    sets: dict[str, set[int]],
    paths: Mapping[str, str],
    before: Mapping[str, set[int]],
) -> None:
    """Takes into a layer what only it needs: expressions of its weights, its part of masks.

    What the stream before it is computed from stays out, and so do other modules' parameters and
    everything random, whose order counts.
    """
    owners = {i: k for k, s in sets.items() for i in s}
    for i in sorted(flow.computed(range(len(flow.nodes))), reverse=True):
        users = {owners.get(j) for j in flow.after[i]}
        label = next(iter(users), None)
        if i in owners or len(users) != 1 or label is None or i in before[label]:
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


def _ordered(flow: _Flow, parts: Mapping[Part, int]) -> tuple[Part | Node, ...]:
    """Blocks and other nodes, each as soon as what it needs is there, else in graph order."""
    unit: dict[int, Part | Node] = dict(enumerate(flow.nodes))
    unit |= {flow.index[n]: part for part in parts for n in part.nodes}
    first: dict[Part | Node, int] = {one: i for i, one in unit.items()} | dict(parts)
    starts = {i: one for one, i in first.items()}
    needs: dict[Part | Node, set[Part | Node]] = {}
    for i, one in unit.items():
        needs.setdefault(one, set()).update(unit[j] for j in flow.before[i] if unit[j] is not one)
    opens: dict[Part | Node, list[Part | Node]] = {}
    for one, needed in needs.items():
        for other in needed:
            opens.setdefault(other, []).append(one)
    ready = [first[one] for one, needed in needs.items() if not needed]
    heapq.heapify(ready)
    done: list[Part | Node] = []
    while ready:
        one = starts[heapq.heappop(ready)]
        done.append(one)
        for follower in opens.get(one, ()):
            needs[follower].discard(one)
            if not needs[follower]:
                heapq.heappush(ready, first[follower])
    stuck = [one for one in needs if needs[one] and isinstance(one, Part)]
    if stuck:
        blocker = next(iter(needs[stuck[0]]))
        name = blocker.label if isinstance(blocker, Part) else blocker.name
        raise BlockError(
            f"the blocks are not regular: {stuck[0].label} ({stuck[0].path}) and {name} each need "
            "a value of the other, so neither can run first. Train the program as one module "
            "(program.module)."
        )
    drawn = [n for one in done for n in (one.nodes if isinstance(one, Part) else [one])]
    drawn = [n for n in drawn if _is_random(n)]
    for node, following in pairwise(drawn):
        if flow.index[node] > flow.index[following]:
            raise BlockError(
                f"the blocks are not regular: {node.name} has to run before {following.name}, "
                "which draws random numbers before it in the model, so training would differ. "
                "Train the program as one module (program.module)."
            )
    return tuple(done)
