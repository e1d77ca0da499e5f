"""Inlining: calls of inserted modules become the operators that they run, parameters keep names.

All calls are exported at once, in both modes, and each result's part of the graph is put where its
call was; fake values are recomputed in the program's own sizes. Afterwards the graph needs no class
of any method: only operators and the modes' modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ...axes.ties import GETITEM
from ...errors import PassError
from ...graph.aten import (
    ancestors,
    attribute,
    erase_dead,
    is_op,
    output_node,
    placeholders,
    set_attribute,
    shape,
    value,
)
from ...graph.modes import MODES, restore_modes
from ...program.state import State
from ...tracing.canonical import canonicalize
from ...tracing.propagate import fake_mode
from ...tracing.tracing import export
from ...tracing.training import part_modes

_HELD = "held"


class _Calls(nn.Module):
    """Runs every call by itself, on tensors named by call and by place among its inputs."""

    def __init__(self, gm: GraphModule, calls: Sequence[Node]) -> None:
        super().__init__()
        self.held = nn.ModuleList(gm.get_submodule(str(c.target)) for c in calls)
        self.calls = calls

    def forward(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        results: list[Any] = []
        for index, (module, call) in enumerate(zip(self.held, self.calls, strict=True)):
            mine = {node: tensors[name] for name, node in _sources(index, call).items()}
            loaded: Any = map_arg((call.args, call.kwargs), lambda n, m=mine: m[n])
            args, kwargs = loaded
            results += pytree.tree_leaves(module(*args, **kwargs))
        return results


def _sources(index: int, call: Node) -> dict[str, Node]:
    return {f"x{index}_{place}": node for place, node in enumerate(call.all_input_nodes)}


def inline_calls(program: State) -> None:
    """Inlines every module that passes inserted, in place; branches end as plain parameters.

    Results keep the recorded values of their calls (a padded input has the size that the graph
    was made for).

    Raises:
        CaptureError: a module cannot be traced.
        PassError: a module is called with something other than tensors of the graph.
    """
    gm = program.module
    calls = [
        n for n in gm.graph.nodes
        if n.op == "call_module" and not str(n.target).startswith(f"{MODES}.")
    ]  # fmt: skip
    if not calls:
        return
    traced = _traced(gm, calls)
    translate = _Translation(gm, traced, calls)
    named = {name for site in program.sites for name in site.nodes}
    results: list[Node] = list(output_node(traced).args[0])  # pyright: ignore
    for index, call in enumerate(calls):
        count = len(pytree.tree_leaves(value(call)))
        mine, results = results[:count], results[count:]
        new = _place(gm, traced, calls, index, mine, translate)
        if call.name in named and new is not None:
            new.name = call.name  # sites name it so
    for path in dict.fromkeys(str(c.target) for c in calls):
        _dissolve(gm, path)
    program.attachments, program.shared = (), ()
    erase_dead(gm)
    gm.recompile()


def _traced(gm: GraphModule, calls: Sequence[Node]) -> GraphModule:
    """One graph that computes all calls, with the train/eval switch of each."""
    example: dict[str, Tensor] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for index, call in enumerate(calls):
        for name, node in _sources(index, call).items():
            val = value(node)
            if not isinstance(val, Tensor):
                raise PassError(f"{call.name} is called with {node.name}, which is no tensor.")
            dims: tuple[Any, ...] = tuple(val.shape)
            sizes = [s if isinstance(s, int) else s.node.hint for s in dims]
            example[name] = torch.zeros(sizes, dtype=val.dtype, device=val.device)
            shapes[name] = {
                axis: torch.export.Dim.AUTO
                for axis, size in enumerate(dims)
                if not isinstance(size, int)
            }
    module = _Calls(gm, calls)
    graphs: list[GraphModule] = []
    for training in (True, False):
        exported = export(module, example, lambda t: ((t,), {}), shapes, training)
        graph = exported.module(check_guards=False)
        canonicalize(graph, {})
        restore_modes(graph)
        graphs.append(graph)
    first, second = ([(n.op, str(n.target)) for n in g.graph.nodes] for g in graphs)
    if first != second:
        part_modes(*graphs)
    return graphs[0]


def _place(
    gm: GraphModule, traced: GraphModule, calls: Sequence[Node], index: int, results: list[Node],
    translate: _Translation,
) -> Node | None:  # fmt: skip
    """Puts the part of `traced` that computes `results` where call number `index` was; returns the
    value of a call that gives one."""
    call = calls[index]
    copies: dict[Node, Node] = {}
    sources = _sources(index, call)
    needed = {n for r in results for n in ancestors(r)}
    with gm.graph.inserting_before(call):
        for node in traced.graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                copies[node] = sources[str(node.target)]
                continue
            copies[node] = gm.graph.node_copy(node, lambda n: copies[n])
            copies[node].meta = {"val": translate(value(node))}
            if node.op == "get_attr":
                copies[node].target = _kept(gm, traced, calls, str(node.target))
            elif node.op == "call_module":
                path = _fresh(gm, str(node.target))
                gm.add_submodule(path, traced.get_submodule(str(node.target)))
                copies[node].target = path
    given = value(call)
    for result, val in zip(results, pytree.tree_leaves(given), strict=True):
        if result.op not in ("placeholder", "get_attr"):
            copies[result].meta["val"] = val
    if isinstance(given, Tensor):
        call.replace_all_uses_with(copies[results[0]])
        gm.graph.erase_node(call)
        return copies[results[0]]
    keys: list[Any] = list(given) if isinstance(given, Mapping) else list(range(len(results)))
    for user in list(call.users):
        if not is_op(user, GETITEM) or not isinstance(value(user), Tensor):
            raise PassError(f"{user.name} reads several results of {call.name} at once.")
        user.replace_all_uses_with(copies[results[keys.index(user.args[1])]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


class _Translation:
    """Fake values of the traced graph in the program's own sizes."""

    def __init__(self, gm: GraphModule, traced: GraphModule, calls: Sequence[Node]) -> None:
        self.mode = fake_mode(gm)
        self.sizes: dict[Any, Any] = {}
        inputs = placeholders(traced)
        for index, call in enumerate(calls):
            for name, node in _sources(index, call).items():
                theirs = shape(inputs[name]) if name in inputs else None
                pairs: Any = zip(shape(node) or (), theirs or (), strict=False)
                for ours, size in pairs:
                    if not isinstance(size, int):
                        self.sizes[size.node.expr] = (
                            ours if isinstance(ours, int) else ours.node.expr
                        )

    def __call__(self, val: Any) -> Any:
        return pytree.tree_map(self._one, val)

    def _one(self, val: Any) -> Any:
        if not isinstance(val, Tensor):
            return self._size(val) if hasattr(val, "node") else val
        sizes, strides = [self._size(s) for s in val.shape], [self._size(s) for s in val.stride()]
        with self.mode, torch.no_grad():
            return torch.empty_strided(sizes, strides, dtype=val.dtype, device=val.device)

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        expression = size.node.expr.xreplace(self.sizes)
        if expression.is_number:
            return int(expression)
        return self.mode.shape_env.create_symintnode(expression, hint=size.node.hint)


def _kept(gm: GraphModule, traced: GraphModule, calls: Sequence[Node], target: str) -> str:
    """Where a tensor of the traced graph is in the program; constants are put there."""
    head, _, rest = target.partition(".")
    if head == _HELD:
        number, _, leaf = rest.partition(".")
        return f"{calls[int(number)].target}.{leaf}"
    path = _fresh(gm, f"soft.constant_{len(getattr(gm, 'soft', nn.Module())._buffers)}")
    set_attribute(gm, path, attribute(traced, target).detach(), transient=False)
    return path


def _fresh(gm: nn.Module, path: str) -> str:
    """`path` with the first number at its end that is not taken."""
    stem, _, number = path.rpartition("_")
    index = int(number)
    while True:
        try:
            attribute(gm, f"{stem}_{index}")
        except AttributeError:
            return f"{stem}_{index}"
        index += 1


def _dissolve(gm: GraphModule, path: str) -> None:
    """Leaves of a module only those tensors that the graph reads, under the same names."""
    module = gm.get_submodule(path)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lasting = set(module.state_dict())
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    gm.delete_submodule(path)
    for name, tensor in tensors.items():
        if f"{path}.{name}" in read:
            set_attribute(gm, f"{path}.{name}", tensor, name not in lasting)
