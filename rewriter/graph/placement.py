"""Where tensors live: moving a graph between devices, and models that have no storage yet."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from .aten import attribute
from .turns import alone

_BUILD_ERRORS = (
    TypeError, ValueError, AttributeError, LookupError, RuntimeError, ImportError, ArithmeticError,
)  # fmt: skip


def is_hollow(model: nn.Module) -> bool:
    """Whether any parameter has no storage."""
    return any(p.is_meta for p in model.parameters())


def relocate(gm: nn.Module, old: torch.device, new: torch.device) -> None:
    """Makes graphs that were captured on one device run on another; their tensors stay put.

    Device literals (`arange(device=...)`) and recorded fake values on `old` move to `new`; literals
    of a third device were meant, and stay.
    """
    for module in gm.modules():
        if isinstance(module, GraphModule):
            relocate_graph(module.graph, old, new)
            module.recompile()


@alone()
def relocate_graph(graph: Graph, old: torch.device, new: torch.device) -> None:
    """See `relocate`; the code is not generated again."""

    def moved(arg: Any) -> Any:
        return new if isinstance(arg, torch.device) and arg.type == old.type else arg

    def fake(val: Tensor) -> Tensor:
        mode = getattr(val, "fake_mode", None)
        if mode is None or val.device.type != old.type:
            return val
        with mode, torch.no_grad():
            return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=new)

    for node in graph.nodes:
        args, kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
        node.args, node.kwargs = args, kwargs
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(Tensor, fake, node.meta["val"])


@contextlib.contextmanager
def buffers_on_meta(model: nn.Module) -> Iterator[None]:
    """Lets a model with parameters on meta run on meta; its buffers are put back afterwards."""
    saved = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    try:
        for module, name, buffer in saved:
            module._buffers[name] = buffer.to("meta")
        yield
    finally:
        for module, name, buffer in saved:
            module._buffers[name] = buffer


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Real values of the buffers that a checkpoint does not hold, as far as they can be known.

    A buffer on meta is computed again by building its module, or the nearest module around it,
    a second time with parameters on meta. That is possible for a class that is built from one
    `config` that it keeps, or keeps every constructor argument under its name.
    """
    persistent = set(model.state_dict(keep_vars=True))
    built: dict[str, nn.Module | None] = {}
    buffers: dict[str, Tensor] = {}
    for name, buffer in model.named_buffers():
        if name in persistent:
            continue
        known = buffer.detach() if not buffer.is_meta else _computed(model, name, buffer, built)
        if known is not None:
            buffers[name] = known
    return buffers


def _computed(
    model: nn.Module, name: str, like: Tensor, built: dict[str, nn.Module | None]
) -> Tensor | None:
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        path, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
        if path not in built:
            built[path] = _built_again(model.get_submodule(path))
        again = built[path]
        if again is None:
            continue
        buffer = dict(again.named_buffers()).get(rest)
        if buffer is not None and not buffer.is_meta and buffer.shape == like.shape:
            return buffer.detach().to(like.dtype)
    return None


def _built_again(module: nn.Module) -> nn.Module | None:
    arguments = _arguments(module)
    if arguments is None:
        return None
    register = nn.Module.register_parameter

    def without_storage(owner: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(owner, name, param)
        if param is not None:
            owner._parameters[name] = nn.Parameter(param.to("meta"), param.requires_grad)

    patched = mock.patch.object(nn.Module, "register_parameter", without_storage)
    try:
        with patched, torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return type(module)(**arguments)
    except _BUILD_ERRORS:
        return None  # a constructor that needs more than it keeps; the next module up is tried


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """The arguments that a module was built with, if it keeps them."""
    kinds = inspect.Parameter
    wanted = [
        p
        for p in list(inspect.signature(type(module).__init__).parameters.values())[1:]
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        and p.name not in ("device", "dtype")
    ]
    if type(module).__module__.startswith("torch."):
        return None
    if wanted and wanted[0].name == "config":
        wanted = [p for p in wanted if p.name == "config" or p.default is kinds.empty]
    if not all(p.name in module.__dict__ for p in wanted):
        return None
    return {p.name: module.__dict__[p.name] for p in wanted}


def still_hollow(gm: GraphModule, extras: Mapping[str, Tensor]) -> list[str]:
    """Names of stored tensors without storage."""
    tensors: dict[str, Any] = dict(extras)
    for node in gm.graph.nodes:
        if isinstance(node, Node) and node.op == "get_attr":
            tensors[str(node.target)] = attribute(gm, str(node.target))
    return sorted(n for n, t in tensors.items() if isinstance(t, Tensor) and t.is_meta)
