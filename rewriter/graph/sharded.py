"""Tensors that are sharded over ranks (torch's `DTensor`): gathered where whole values are needed.

Gathering is a collective: every rank has to get there, in the same order. Nothing here imports
`torch.distributed.tensor`, which takes longer than the rest of torch; who has sharded tensors has.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from ..errors import PassError
from .aten import placeholders
from .walks import fact


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is one of several ranks' parts."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def has_shards(module: nn.Module) -> bool:
    """Whether any parameter is sharded, once gathered units have given back what they gathered."""
    reshard(module)
    return any(is_sharded(p) for p in module.parameters())


def require_whole(module: nn.Module, what: str) -> None:
    """Raises PassError where something that needs whole weights meets sharded ones."""
    if has_shards(module):
        raise PassError(
            f"{what} needs whole weights, but the program's are sharded over ranks. Do it before "
            "sharding, or with peftfx.distributed.gather(program)."
        )


def reshard(module: nn.Module) -> None:
    """Lets the units of `fully_shard` drop what they gathered, so that parameters are shards."""
    units: list[Any] = fact(
        module, "units", lambda: [m for m in module.modules() if _is_unit(type(m))]
    )
    for unit in units:
        unit.reshard()


@functools.cache
def _is_unit(kind: Any) -> bool:
    return hasattr(kind, "reshard") and hasattr(kind, "unshard")


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor, without gradient; itself if it is not sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    return sharded.full_tensor()


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A complete tensor, equal on all ranks, sharded as `like` is; itself if that is not."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    kind: Any = like
    return distribute_tensor(tensor, kind.device_mesh, kind.placements, src_data_rank=None)


def whole_module(module: nn.Module) -> nn.Module:
    """A module with complete parameters, a copy if there is anything to gather."""
    parameters = list(module.parameters())
    if not any(map(is_sharded, parameters)):
        return module
    memo = {id(p): nn.Parameter(whole(p.detach()), p.requires_grad) for p in parameters}
    return copy.deepcopy(module, memo)


class Gathering(Interpreter):
    """Runs a graph over sharded parameters: each is gathered at each use and dropped again."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, whole, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, whole, (args, kwargs))
        return super().call_method(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, whole, (args, kwargs))
        return whole_module(self.fetch_attr(str(target)))(*args, **kwargs)


def outputs(gm: GraphModule, inputs: Mapping[str, Tensor]) -> Any:
    """What a program's module returns in evaluation, sharded or not; of sharded ones the leaves.

    Sharded parameters are gathered one at a time, so no rank ever holds the whole model.
    """
    if not has_shards(gm):
        return gm(**inputs)
    given = [inputs[name] for name in placeholders(gm)]
    with torch.no_grad():
        return Gathering(gm).run(*given, enable_io_processing=False)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and values; those without storage have none."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    return a.shape == b.shape and torch.equal(whole(a.detach()), whole(b.detach()))
