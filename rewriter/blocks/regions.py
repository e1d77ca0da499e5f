"""Which nodes of a graph run on some tokens only: from a routed branch's gathers to its scatter."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ..api import Program
from ..branches.routing import PutTokens, Routed, TakeTokens
from ..graph.aten import is_op, operands, submodule
from ..graph.flow import Flow, site_nodes
from ..program.sites import SublayerSite


@dataclass(frozen=True)
class Routing:
    """A region by graph positions.

    Attributes:
        label: the sublayers that it holds, `s0.layer3.attn+s0.layer3.ffn`.
        branch: path of the branch that chooses its tokens.
        inside: what is computed from the gathered values on the way to the scatter, and of
            stored tensors for that alone (expressions of its weights).
        around: the choice, the gathers, the scatter, and all between them.
    """

    label: str
    branch: str
    inside: frozenset[int]
    around: frozenset[int]


def routings(program: Program, flow: Flow) -> Iterator[Routing]:
    """The regions of a program's routed branches."""
    gm = program.module
    nodes = site_nodes(gm)
    sums = {
        flow.index[nodes[s.nodes[1]]]: s.id for s in program.sites if isinstance(s, SublayerSite)
    }
    fed = flow.below(i for i, n in enumerate(flow.nodes) if n.op == "placeholder")
    fixed = sorted(flow.computed(range(len(flow.nodes))) - fed, reverse=True)
    branches = {a.path for a in program.attachments if a.slot == Routed.slot}
    for node in flow.nodes:
        if node.op != "call_module" or node.target not in branches:
            continue
        index = next(u for u in node.users if is_op(u, operator.getitem) and operands(u)[1] == 0)
        takes = [flow.index[u] for u in index.users if isinstance(submodule(gm, u), TakeTokens)]
        put = next(u for u in index.users if isinstance(submodule(gm, u), PutTokens))
        after: Node = operands(put)[2]
        inside = flow.below(takes, [flow.index[after]]) - set(takes)
        for i in fixed:
            if flow.after[i] and flow.after[i] <= inside:
                inside.add(i)
        around = flow.closed({flow.index[node], flow.index[put]})
        label = "+".join(name for i, name in sorted(sums.items()) if i in inside)
        yield Routing(label, str(node.target), frozenset(inside), frozenset(around))
