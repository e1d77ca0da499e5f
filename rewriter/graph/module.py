"""The module of a program: a graph module that knows what may be changed after capture, and forks.

Devices that the graph names (`arange(device=cpu)`) move with the tensors. The dtype does not: casts
to a literal dtype and branches on the dtype were decided when the model was traced.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph_module import _WrappedCall
from torch.fx.node import map_arg

from ..errors import CaptureError
from .aten import attribute, set_attribute, submodule, written
from .clone import clone
from .placement import relocate
from .walks import Walked, fact, settled


class CapturedModule(Walked, GraphModule):
    """A graph module that moves between devices as a whole and refuses another dtype."""

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "GraphModule") -> None:
        _show_device(type(self), root)
        super().__init__(root, graph, class_name)

    def _deepcopy_init(self) -> Callable[..., None]:
        return functools.partial(CapturedModule.__init__, class_name=type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.cuda()`, `.half()` and the like call, for every tensor.

        Raises:
            CaptureError: it would change a floating-point dtype; nothing is changed.
        """
        before = device_of(self)
        keeps_dtype(self, fn, before)
        super()._apply(fn, recurse)
        if (after := device_of(self)) != before:
            relocate(self, before, after)
        return self

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        renew(self)
        return super().code

    @property
    def device(self) -> Any:
        """The device of the stored tensors; what the model itself calls so, if anything."""
        return device_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles code, not nodes, as torch does; what is read back is of this class again."""
        return _unpickled, (*super().__reduce__(), type(self).__name__)


def outdate(gm: CapturedModule) -> None:
    """Says that the graph was edited: its code is made when that is first looked for."""
    kind: Any = type(gm)
    kind.forward = _Later(gm)


def renew(gm: GraphModule) -> None:
    """Makes the code of a graph that was edited, if that is still to be done."""
    with _COMPILING:
        if _is_outdated(gm):
            gm.recompile()


_COMPILING = threading.RLock()


class _Later:
    """Stands for the forward of a graph module until somebody asks for it, or for its code."""

    def __init__(self, gm: CapturedModule) -> None:
        self.gm = weakref.ref(gm)

    def __get__(self, gm: GraphModule | None, kind: Any) -> Any:
        """The method, made now; of the class where no module is given."""
        source = self.gm() or gm
        if source is None:
            raise AttributeError("forward")
        renew(source)
        return kind.forward if gm is None else gm.forward


def _is_outdated(gm: GraphModule) -> bool:
    return isinstance(inspect.getattr_static(type(gm), "forward"), _Later)


def _show_device(kind: Any, root: nn.Module) -> None:
    """Lets a module's class, which every instance has of its own, give what the model itself calls
    a device."""
    if own_attribute(root, "device") is not None:
        kind.device = property(lambda me: own_attribute(me, "device"))


def _unpickled(build: Callable[..., GraphModule], arguments: Any, name: str) -> CapturedModule:
    gm = build(*arguments)
    module = CapturedModule(gm, gm.graph, class_name=name)
    copy_modes(gm, module)
    return module


def own_attribute(module: nn.Module, name: str) -> Any:
    """The child, parameter or buffer that a module has under a name, which a class may hide."""
    tables: tuple[Any, ...] = (module._modules, module._parameters, module._buffers)
    return next((table[name] for table in tables if name in table), None)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first tensor."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def same_view(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def keeps_dtype(module: nn.Module, fn: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Raises CaptureError if `fn` would change a floating-point dtype of a captured module."""
    tensors = [*module.parameters(), *module.buffers()]
    for dtype in {t.dtype for t in tensors if t.is_floating_point()}:
        changed = fn(torch.empty(0, dtype=dtype, device=device)).dtype
        if changed != dtype:
            raise CaptureError(
                f"a captured graph keeps its dtype: casts to {dtype} are part of it, so "
                f"{changed} would give wrong results or fail. Capture again in that dtype: "
                f"peftfx.capture(model, ..., dtype={changed}). For mixed precision, run it "
                "under torch.autocast."
            )


def state_tensors(gm: GraphModule) -> set[str]:
    """Names of stored tensors that a forward updates (batch statistics).

    A module's `updates_state` says which of its arguments it writes, by position, or True for all.
    """
    return fact(gm, "state", lambda: _state_tensors(gm))


def _state_tensors(gm: GraphModule) -> set[str]:
    names: set[str] = set()
    for node in gm.graph.nodes:
        if places := getattr(submodule(gm, node), "updates_state", False):
            inputs = node.all_input_nodes if places is True else [node.args[i] for i in places]
            names |= {str(a.target) for a in inputs if isinstance(a, Node) and a.op == "get_attr"}
        elif (target := written(node)) is not None and target.op == "get_attr":
            names.add(str(target.target))
    return names


def state_buffers(gm: GraphModule) -> set[str]:
    """Those of `state_tensors` that are buffers."""
    return state_tensors(gm) & {n for n, _ in gm.named_buffers()}


def fork_module(gm: GraphModule) -> CapturedModule:
    """Copies graph and modules; shares frozen tensors, copies trainable and updated ones."""
    with settled(gm):
        return _forked(gm, state_tensors(gm), {})


def _forked(gm: GraphModule, updated: set[str], memo: dict[int, Any]) -> CapturedModule:
    for name, parameter in gm.named_parameters():
        data = parameter.detach()
        memo[id(parameter)] = nn.Parameter(
            data.clone() if parameter.requires_grad or name in updated else data,
            parameter.requires_grad,
        )
    for name, buffer in gm.named_buffers():
        memo[id(buffer)] = buffer.detach().clone() if name in updated else buffer.detach()
    if not (isinstance(gm, CapturedModule) and type(gm).__bases__ == (CapturedModule,)):
        return _rebuild(gm, gm.graph, memo, type(gm).__name__)  # a unit of `fully_shard`
    if all_read(gm):
        return _coded_like(gm, _whole(gm, memo))
    forked = _coded_like(gm, _needed(gm, gm.graph, memo))
    copy_modes(gm, forked)
    return forked


def _coded_like(source: CapturedModule, root: nn.Module) -> CapturedModule:
    """A module over a copy of a graph, and all that `root` holds, with the code that there is."""
    twin: Any = CapturedModule.__new__(CapturedModule)
    twin.__dict__.update(source.__getstate__())
    twin.__dict__.update(root.__dict__)
    twin.__dict__.update({k: type(v)() for k, v in vars(source).items() if k in _NOTES})
    graph = copy_graph(source.graph)
    graph.owning_module = twin
    twin.__dict__["_graph"] = graph
    kind, known = type(twin), type(source)
    kind.__name__, kind.__call__ = known.__name__, known.__call__
    if _is_outdated(source):
        outdate(twin)
    else:
        kind.forward = known.forward
    kind._wrapped_call = _WrappedCall(kind, None)
    _show_device(kind, root)
    return twin


_NOTES = ("meta", "_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks")
"""What torch notes of a graph module beside its graph."""


def twin_module(gm: CapturedModule, memo: dict[int, Any]) -> CapturedModule:
    """A module that runs the same code over tensors and submodules of its own, at little cost.

    Args:
        gm: its graph and code are shared, so neither may be edited.
        memo: what stands for its tensors, by the id of each.
    """
    if hasattr(gm, "unshard"):  # a unit of `fully_shard`
        return _rebuild(gm, gm.graph, memo, type(gm).__name__)
    renew(gm)
    twin = object.__new__(type(gm))
    twin.__dict__.update(gm.__getstate__())  # without what it was compiled to
    twin.__dict__.update({k: v for k, v in nn.Module().__dict__.items() if "hook" in k})
    for table in ("_parameters", "_buffers"):
        entries = {k: memo.get(id(t), t) for k, t in gm.__dict__[table].items()}
        twin.__dict__[table] = entries
    children = {k: clone(m, memo) for k, m in gm._modules.items()}
    twin.__dict__["_modules"] = children
    return twin


def sharing_module(source: nn.Module, graph: Graph, name: str) -> CapturedModule:
    """Copies graph and modules; all Parameter objects and buffers are those of `source`.

    Args:
        source: holds what the graph reads and calls, by path.
        graph: is copied.
        name: the class name of the result.
    """
    tensors: list[Tensor] = [*source.parameters(), *source.buffers()]
    return _rebuild(source, graph, {id(t): t for t in tensors}, name)


def all_read(gm: GraphModule) -> bool:
    """Whether the graph reads or calls everything that its module holds, as after a fork."""
    nodes = gm.graph.nodes
    called = {str(n.target) for n in nodes if n.op == "call_module"}
    stored = {str(n.target) for n in nodes if n.op == "get_attr"}
    stack: list[tuple[str, nn.Module]] = [("", gm)]
    while stack:
        path, module = stack.pop()
        children = [(f"{path}{n}", m) for n, m in module.named_children()]
        names = [f"{path}{n}" for n in (*module._parameters, *module._buffers)]
        if any(name not in stored for name in names) or not (names or children):
            return False
        stack += [(f"{n}.", m) for n, m in children if n not in called]
    return True


def _rebuild(source: nn.Module, original: Graph, memo: dict[int, Any], name: str) -> CapturedModule:
    """A graph module with what a graph needs of `source`; `memo` says what stands for tensors."""
    root = _needed(source, original, memo)
    rebuilt = CapturedModule(root, copy_graph(original), class_name=name)
    copy_modes(source, rebuilt)
    return rebuilt


def _whole(source: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A module with copies of all that `source` holds."""
    root, tables = nn.Module(), vars(source)
    root.training = source.training
    root._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    for name in ("_parameters", "_buffers", "_modules"):
        root.__dict__[name] = {k: clone(v, memo) for k, v in tables[name].items()}
    return root


def _needed(source: nn.Module, original: Graph, memo: dict[int, Any]) -> nn.Module:
    """A module with what a graph reads and calls of `source`."""
    root, transient = nn.Module(), transient_buffers(source)
    for node in original.nodes:
        path = str(node.target)
        if node.op == "call_module" and not _has(root, path):
            _place(root, path, clone(source.get_submodule(path), memo))
        elif node.op == "get_attr" and not _has(root, path):
            tensor = attribute(source, path)
            set_attribute(root, path, memo.get(id(tensor), tensor), path in transient)
    return root


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Gives every module of `target` the mode that the one of its name has in `source`."""
    modes = {path: module.training for path, module in source.named_modules()}
    for path, module in target.named_modules():
        module.training = modes.get(path, source.training)


@contextlib.contextmanager
def state_kept(gm: GraphModule) -> Iterator[None]:
    """Puts back what a forward in evaluation mode writes; most models write nothing then."""
    targets = {t for n in gm.graph.nodes if (t := written(n)) is not None and t.op == "get_attr"}
    tensors: list[Tensor] = [attribute(gm, str(node.target)) for node in targets]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, kept in zip(tensors, before, strict=True):
            tensor.data.copy_(kept)


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Puts the mode of every submodule back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def copy_graph(original: Graph) -> Graph:
    """A copy of a graph that shares the fake values and the input and output structure."""
    graph = Graph()
    graph.set_codegen(original._codegen)
    copied: dict[Node, Node] = {}
    for node in original.nodes:
        args = map_arg(node.args, copied.__getitem__)
        kwargs = map_arg(node.kwargs, copied.__getitem__) if node.kwargs else node.kwargs
        copied[node] = _inserted(graph, node, args, kwargs)
    return graph


def _inserted(graph: Graph, node: Node, args: Any, kwargs: Any) -> Node:
    """As `Graph.node_copy` at the end of a graph, without looking at what was looked at before."""
    space = graph._graph_namespace
    name = space.create_name(node.name, None)
    copied = Node(graph, name, node.op, node.target, args, kwargs, node.type)
    copied.meta.update(node.meta)
    space.associate_name_with_obj(name, copied)
    graph._insert(copied)
    graph._find_nodes_lookup_table.insert(copied)
    graph._len += 1
    return copied


def transient_buffers(gm: nn.Module) -> set[str]:
    """Names of buffers that are not part of the state dict."""
    names: set[str] = set()
    for prefix, module in gm.named_modules():
        for name in module._non_persistent_buffers_set:
            names.add(f"{prefix}.{name}" if prefix else name)
    return names


def _has(root: nn.Module, path: str) -> bool:
    try:
        attribute(root, path)
    except AttributeError:
        return False
    return True


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        child = getattr(root, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            root.add_module(part, child)
        root = child
    root.add_module(leaf, module)
