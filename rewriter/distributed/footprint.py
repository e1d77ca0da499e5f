"""What each rank really holds in training: its own part of everything, in bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.substitutes import watched
from ..files.ranks import exchange
from ..graph.sharded import reshard


@dataclass(frozen=True)
class Held:
    """Bytes on one rank.

    Attributes:
        parameters: the rank's part of parameters and buffers, trained ones included.
        gradients: of what trains, as many bytes as its parameters (they come with backward).
        optimizer: its states, 0 before the first step.
        activations: what one forward kept for backward, without parameters; None if none was run.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int | None = None


def held(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Callable[[], Any] | None = None,
) -> tuple[Held, ...]:
    """What every rank holds, in their order; every rank calls it.

    Args:
        module: as trained, wrapped or sharded.
        optimizer: of its parameters.
        forward: runs the module on this rank's batch and returns the loss; nothing is trained.
    """
    kept = None if forward is None else _kept(module, forward)
    reshard(module)
    parameters = list(module.parameters())
    states = [] if optimizer is None else optimizer.state.values()
    mine = Held(
        _bytes([*parameters, *module.buffers()]),
        _bytes(p for p in parameters if p.requires_grad),
        _bytes(t for s in states for t in s.values() if isinstance(t, Tensor)),
        kept,
    )
    rows = exchange([mine.parameters, mine.gradients, mine.optimizer, mine.activations])
    return tuple(Held(*row) for row in rows)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(_local, tensors))


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _Saved:
    """A tensor for as long as the graph of autograd needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept(module: nn.Module, forward: Callable[[], Any]) -> int:
    saved: list[weakref.ref[_Saved]] = []
    kept: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> _Saved:
        packed = _Saved(tensor)
        saved.append(weakref.ref(packed))
        return packed

    def seen(tensor: Tensor) -> None:
        kept.append(weakref.ref(tensor))

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor)
    with hooks, watched(module, seen):
        loss = forward()
    # Of a sharded module, what the last unit gathered is there; the rest has no bytes any more.
    own = {_storage(t) for t in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    there = [s.tensor for r in saved if (s := r()) is not None]
    for tensor in (*there, *(t for r in kept if (t := r()) is not None)):
        if _storage(tensor) not in own:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
    del loss
    return sum(sizes.values())


def _storage(tensor: Tensor) -> int:
    return _local(tensor).untyped_storage()._cdata
