"""Frozen parameters of blocks on the CPU, brought to the device when a block needs them.

A copy lives while its operator runs: autograd keeps the parameter in its place and brings it again
for the backward pass; a checkpointed block's are all there while its backward runs. What trains
stays on the device. Parameters are pinned where there is CUDA, and copied on the stream that uses
them, so nothing waits for a copy but its operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from ..api import Program
from ..errors import BlockError
from ..graph.aten import attribute, is_float, set_attribute
from ..graph.module import same_view, sharing_module
from .hidden_names import names
from .substitutes import Kept, Recipe


def fetch(weight: Tensor, device: torch.device) -> Tensor:
    """A copy of a parameter on a device, also where that is the CPU."""
    return weight.detach().to(device, non_blocking=True, copy=True)


class Offload:
    """What a block calls for each of its parameters."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, weight: Tensor, like: Tensor) -> Tensor:
        """A frozen parameter on the device of `like`; one that trains as it is."""
        if weight.requires_grad:
            return weight
        copy = fetch(weight, like.device)
        self.kept.replace(copy, Recipe(fetch, (weight, like.device)))
        return copy


def offload(module: nn.Module) -> None:
    """Moves the frozen parameters of all blocks to the CPU, and fetches them from there.

    Those of the program as captured, which the module holds too, move with them.

    Raises:
        BlockError: nothing in the blocks is frozen.
    """
    if not _frozen(module):
        raise BlockError(
            "offload=True, but nothing in the blocks is frozen. Insert an adapter first "
            "(run(program, 'lora')), or leave offload out."
        )
    for block in names(module).blocks:
        block.kept = block.kept or Kept()
        for inner in (block, *block.regions):
            inner.offload = Offload(block.kept)
            inner.trace(_fetching(inner))
    moved: dict[Any, Tensor] = {}
    for parameter in _frozen(module).values():
        view = same_view(parameter)
        _to_cpu(parameter)
        moved[view] = parameter.data
    origin = names(module).flat.program.origin
    if origin is not None:
        program = replace(names(module).flat.program, origin=_base(origin, module, moved))
        names(module).flat = replace(names(module).flat, program=program)


def _base(origin: Program, module: nn.Module, moved: Mapping[Any, Tensor]) -> Program:
    """The program as captured with the parameters of blocks on the CPU: the module's, if shared."""
    gm = origin.module
    shared = sharing_module(gm, gm.graph, type(gm).__name__)
    for name, parameter in list(shared.named_parameters()):
        if _inside(name, module) and not parameter.is_meta:
            data = moved.get(same_view(parameter))
            data = parameter.data.cpu() if data is None else data
            set_attribute(shared, name, nn.Parameter(data, requires_grad=False))
    return replace(origin, module=shared)


def staying(module: nn.Module) -> dict[Any, Tensor]:
    """Offloaded tensors of the program as captured, for `Program._moved`."""
    origin = names(module).flat.program.origin
    if origin is None or not any(b.offload for b in names(module).blocks):
        return {}
    parameters = origin.module.named_parameters()
    return {same_view(p): p.data for n, p in parameters if _inside(n, module) and not p.is_meta}


def _inside(name: str, module: nn.Module) -> bool:
    return any(name.startswith(f"{block.path}.") for block in names(module).blocks)


def _fetching(traced: Any) -> Graph:
    """Its graph with a fetch behind each parameter that it reads, where it is first read."""
    graph: Graph = traced.graph
    like = next((n for n in graph.find_nodes(op="placeholder") if is_float(n)), None)
    for node in graph.find_nodes(op="get_attr"):
        if like is None or not isinstance(attribute(traced, str(node.target)), nn.Parameter):
            continue
        readers = list(node.users)
        first = next(n for n in graph.nodes if n in readers)
        first.prepend(node)
        with graph.inserting_before(first):
            copy = graph.create_node(
                "call_module", "offload", (node, like), {}, f"{node.name}_copy"
            )
        copy.meta.update(node.meta)
        for reader in readers:
            reader.replace_input_with(node, copy)
    return graph


def _frozen(module: nn.Module) -> dict[tuple[nn.Module, str], nn.Parameter]:
    """The frozen parameters below blocks, by owner and name."""
    owners = [m for b in names(module).blocks for m in b.modules()]
    return {
        (owner, name): parameter
        for owner in owners
        for name, parameter in owner._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }


def _to_cpu(parameter: nn.Parameter) -> None:
    if parameter.device.type == "meta":
        return
    data = parameter.data.cpu()
    parameter.data = data.pin_memory() if torch.cuda.is_available() else data


@contextlib.contextmanager
def aside(module: nn.Module) -> Generator[None]:
    """Takes what is offloaded out of a module while it moves to another device."""
    frozen = _frozen(module) if any(b.offload for b in names(module).blocks) else {}
    try:
        for owner, name in frozen:
            owner._parameters[name] = None
        yield
    finally:
        for (owner, name), parameter in frozen.items():
            owner._parameters[name] = parameter
