"""Looking inside a program: values of its graph beside its outputs, with gradients if wanted.

The looking glass is a second graph over the same Parameters; the program itself is not changed,
and its outputs keep their form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..edits.attention.keyvalue import core_operands
from ..edits.calls.samples import ShownAxes
from ..edits.calls.values import input_of
from ..edits.linear.compose import composed_value
from ..edits.stream.padding import valid_of
from ..errors import PassError, nearest
from ..graph.aten import shape
from ..graph.flow import site_nodes
from ..measure.still import stilled
from ..program.sites import AttentionSite, Site, WeightSite
from ..program.state import State

Reduce = Callable[[Tensor], Tensor]


class Tapped(nn.Module):
    """`module(**batch) -> (outputs, {name: value})`, sharing all tensors with a program."""

    def __init__(self, program: State, values: Mapping[str, Node]) -> None:
        super().__init__()
        gm = program.module
        graph = Graph()
        copied: dict[Node, Node] = {}
        result: Any = graph.graph_copy(gm.graph, copied)
        graph.output((result, {name: copied[node] for name, node in values.items()}))
        self.inner = GraphModule(gm, graph)
        self.spec: Any = gm.graph._codegen.pytree_info.out_spec  # pyright: ignore
        self.names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]

    def forward(self, **batch: Tensor) -> tuple[Any, dict[str, Tensor]]:
        outputs, values = self.inner(*(batch[name] for name in self.names))
        return pytree.tree_unflatten(pytree.tree_leaves(outputs), self.spec), values


def tap(program: State, values: Mapping[str, Site | str], at: str = "output") -> Tapped:
    """A view of a program that also returns values from inside.

    Args:
        program: not changed; its parameters are shared.
        values: name of the value -> a site, or the path of a shared module or branch.
        at: `output` or `input` of sites.

    Raises:
        PassError: there is no such module, or `at` is neither.
    """
    if at not in ("input", "output"):
        raise PassError(f"at must be 'input' or 'output', not {at!r}.")
    nodes = site_nodes(program.module)
    called = {str(n.target): n for n in program.module.graph.nodes if n.op == "call_module"}
    tapped: dict[str, Node] = {}
    for name, what in values.items():
        if not isinstance(what, str):
            node = nodes[what.nodes[0]]
            tapped[name] = input_of(what, nodes) if at == "input" else composed_value(node)
        elif what in called:
            tapped[name] = called[what]
        else:
            raise PassError(
                f"the graph calls no module {what!r}. Nearest: {nearest(what, called)}."
            )
    return Tapped(program, tapped)


def observe(
    program: State,
    data: Iterable[Mapping[str, Tensor]],
    values: Mapping[str, Site | str],
    reduce: Reduce | Mapping[str, Reduce],
    at: str = "output",
) -> dict[str, Tensor]:
    """The mean over batches of a reduction of values inside a program, in evaluation mode.

    Args:
        program: not changed.
        data: batches of the program's inputs; other keys are ignored.
        values, at: as for `tap`.
        reduce: a value -> what to average (of one shape for all batches); for all values, or for
            each by name.

    Raises:
        PassError: there are no batches.
    """
    program = stilled(program)
    tapped = tap(program, values, at)
    totals: dict[str, Tensor] = {}
    count = 0
    for seen in _run(program, tapped, data):
        for name, value in seen.items():
            reduced = (reduce[name] if isinstance(reduce, Mapping) else reduce)(value)
            totals[name] = totals[name] + reduced if name in totals else reduced
        count += 1
    if not count:
        raise PassError("there are no batches to observe: run(program, passes, data=[...]).")
    return {name: total / count for name, total in totals.items()}


def observe_rows(
    program: State,
    data: Iterable[Mapping[str, Tensor]],
    sites: Sequence[WeightSite],
    reduce: Reduce,
) -> Iterator[tuple[str, Tensor]]:
    """(site id, mean over batches of a reduction of the rows that its calls read).

    Args:
        program, data: as for `observe`.
        sites: linears.
        reduce: rows `[n, in]` -> what to average. Those of padding are left out where samples
            and tokens are the first two axes of what is read.
    """
    program = stilled(program)
    nodes = site_nodes(program.module)
    operands: dict[tuple[Node, ...], list[WeightSite]] = {}
    for site in sites:
        calls = (replace(site, nodes=(name,)) for name in site.nodes)
        operands.setdefault(tuple(input_of(c, nodes) for c in calls), []).append(site)
    axes = ShownAxes(program)
    masks = {x: valid_of(program, axes, x) for read in operands for x in read}
    values = {n.name: n for pair in masks.items() for n in pair if n is not None}
    totals: dict[tuple[Node, ...], Tensor] = {}
    count = 0
    for seen in _run(program, Tapped(program, values), data):
        real = {x: None if m is None else seen[m.name] for x, m in masks.items()}
        for read, (site, *_) in operands.items():
            reduced = reduce(torch.cat([_rows(seen[x.name], real[x], site) for x in read]))
            totals[read] = totals[read] + reduced if read in totals else reduced
        count += 1
    for read, shared in operands.items():
        yield from ((site.id, totals[read] / count) for site in shared)


def operand_rows(
    program: State, data: Iterable[Mapping[str, Tensor]], paths: Sequence[str], read: str = ""
) -> Iterator[dict[str, Tensor]]:
    """What branches read, batch by batch, in evaluation mode: path -> rows `[n, width]`.

    Args:
        program, data: as for `observe`.
        paths: of the branches.
        read: of those that read a value under this name, its rows instead of the operand's.

    Padding is left out where samples and tokens are the first two axes.
    """
    program = stilled(program)
    called = {str(n.target): n for n in program.module.graph.nodes if n.op == "call_module"}
    reads: dict[str, Node] = {}
    for path in paths:
        node: Any = called[path]
        reads[path] = node.kwargs.get(read, node.args[0])
    axes = ShownAxes(program)
    masks = {x: valid_of(program, axes, x) for x in reads.values()}
    values = {n.name: n for pair in masks.items() for n in pair if n is not None}
    for seen in _run(program, Tapped(program, values), data):
        rows: dict[str, Tensor] = {}
        for path, x in reads.items():
            branch: Any = program.module.get_submodule(path)
            known, valid = branch.features_last(seen[x.name]), masks[x]
            rows[path] = _real_rows(known, None if valid is None else seen[valid.name])
        yield rows


def observe_keys(
    program: State, batch: Mapping[str, Tensor], sites: Sequence[AttentionSite]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(keys after rotation, values) of the first sample at some attentions, by site id: each
    `[tokens, kv_heads, width]`.

    Args:
        program: not changed.
        batch: of its inputs.

    Raises:
        PassError: heads lie on one axis with samples there.
    """
    program = stilled(program)
    nodes, seen = site_nodes(program.module), dict[str, tuple[AttentionSite, bool]]()
    values: dict[str, Node] = {}
    for site in sites:
        core = core_operands(program.module, nodes[site.nodes[0]])
        if len(shape(core.key) or ()) != 4 or len(shape(core.value) or ()) != 4:
            raise PassError(
                f"{site.id}: its keys are not [batch, heads, tokens, width], so those of one "
                "sample cannot be told. Choose other attentions with where=."
            )
        seen[site.id] = site, core.fused
        values |= {f"{site.id}.key": core.key, f"{site.id}.value": core.value}
    (found,) = _run(program, Tapped(program, values), [batch])

    def rows(x: Tensor, site: AttentionSite) -> Tensor:
        return x[0, :: x.shape[1] // site.kv_heads].transpose(0, 1).contiguous()

    return {
        name: (
            rows(found[f"{name}.key"] if fused else found[f"{name}.key"].mT, site),
            rows(found[f"{name}.value"], site),
        )
        for name, (site, fused) in seen.items()
    }


def _run(program: State, tapped: Tapped, data: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
    """What each batch shows, without gradients; a batch may come with a loss (`gradients`)."""
    taken = set(program.spec.names)
    for given in data:
        batch: Any = given[0] if isinstance(given, tuple | list) else given
        if not isinstance(batch, Mapping):
            raise PassError(
                f"a batch must be a mapping of inputs, not {type(batch).__name__}. Give mappings: "
                "run(program, passes, data=[{'input_ids': ids}, ...])."
            )
        bound = program.spec.bind((), {n: t for n, t in batch.items() if n in taken})
        with torch.no_grad():
            yield tapped(**bound)[1]


def _rows(x: Tensor, valid: Tensor | None, site: WeightSite) -> Tensor:
    """The rows `[n, in]` of an operand."""
    return _real_rows(x.movedim(-2, -1) if site.left else x, valid)


def _real_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None and x.shape[:2] == valid.shape:
        x = x[valid]
    return x.reshape(-1, x.shape[-1])
