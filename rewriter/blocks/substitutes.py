"""What a block keeps for its backward pass in the place of tensors that it can get again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import BlockError


class Recipe:
    """How to get a tensor again; the result is held from its first reader to its last."""

    def __init__(
        self,
        operator: Callable[..., Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.operator = operator
        self.args: Sequence[Any] = [_given(v) for v in args]
        self.kwargs: Mapping[str, Any] = {n: _given(v) for n, v in (kwargs or {}).items()}
        self.readers = 0
        self._left = 0
        self._made: Tensor | None = None
        self._device = ""
        self._autocast = False, torch.float32

    def keep(self, pack: Callable[[Tensor], Any], device: str) -> None:
        """Replaces the tensors among the arguments by what is kept of them."""
        for source in (*self.args, *self.kwargs.values()):
            if isinstance(source, _Source):
                source.kept = pack(source.kept)
        self._device, self._autocast = device, _autocast(device)

    def __call__(self) -> Tensor:
        tensor = self._computed() if self._made is None else self._made
        self._left = (self._left or self.readers) - 1
        self._made = tensor if self._left else None
        return tensor

    def _computed(self) -> Tensor:
        args, kwargs = map(_get, self.args), {n: _get(v) for n, v in self.kwargs.items()}
        with torch.no_grad():
            if self._autocast == _autocast(self._device):
                return self.operator(*args, **kwargs)
            enabled, dtype = self._autocast
            with torch.autocast(self._device, dtype, enabled):
                return self.operator(*args, **kwargs)


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    if not torch.amp.is_autocast_available(device):
        return False, torch.float32
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _given(value: Any) -> Any:
    return _Source(value) if isinstance(value, Tensor) else value


def _get(value: Any) -> Any:
    return value() if isinstance(value, _Source) else value


class _Source:
    """A tensor that a recipe reads, or what is kept of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.kept: Any = tensor.detach()
        self.version = tensor._version

    def __call__(self) -> Tensor:
        tensor = unpack(self.kept)
        if tensor is self.kept and tensor._version != self.version:
            raise BlockError(
                "a tensor that the backward pass needs was changed in place after the forward "
                "pass, so what was computed from it cannot be computed again. Leave "
                "recompute=True out, or change a copy."
            )
        return tensor


@dataclass(frozen=True)
class _View:
    """A view of a tensor that autograd would have kept."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Kept:
    """The recipes of one block, filled while its forward pass runs.

    Attributes:
        entered: whether `hooks` is.
        seen: called with every tensor that is kept, or None.
    """

    def __init__(self) -> None:
        self.entered = False
        self._recipes: dict[int, tuple[StorageWeakRef, Recipe]] = {}
        self.seen: Callable[[Tensor], object] | None = None

    def replace(self, tensor: Tensor, recipe: Recipe) -> None:
        """From now on a recipe is kept instead of a tensor and of its views.

        Outside of `hooks` (in a checkpointed block) nothing is.
        """
        if not self.entered:
            return
        storage = tensor.untyped_storage()
        # The weak reference keeps the storage's address from being used again.
        self._recipes[storage._cdata] = StorageWeakRef(storage), recipe

    def replaces(self, tensor: Tensor) -> bool:
        """Whether something is kept instead of a tensor."""
        return tensor.untyped_storage()._cdata in self._recipes

    @contextlib.contextmanager
    def hooks(self) -> Generator[None]:
        """Autograd keeps recipes where there are some."""
        self.entered = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
                yield
        finally:
            self.entered = False
            self._recipes.clear()

    def pack(self, tensor: Tensor) -> Any:
        """What is kept instead of a tensor, for `unpack`."""
        _, recipe = self._recipes.get(tensor.untyped_storage()._cdata, (None, None))
        if recipe is None:
            if self.seen is not None:
                self.seen(tensor)
            return tensor
        if not recipe.readers:
            recipe.keep(self.pack, tensor.device.type)
        recipe.readers += 1
        where = int(tensor.storage_offset())
        return _View(recipe, tensor.size(), tensor.stride(), where)


@contextlib.contextmanager
def watched(module: nn.Module, seen: Callable[[Tensor], object]) -> Generator[None]:
    """Calls `seen` with every tensor that blocks below `module` keep, which hooks around them do
    not see."""
    candidates = [getattr(m, "kept", None) for m in module.modules()]
    keepers = [kept for kept in candidates if isinstance(kept, Kept)]
    try:
        for kept in keepers:
            kept.seen = seen
        yield
    finally:
        for kept in keepers:
            kept.seen = None


def unpack(kept: Any) -> Tensor:
    """The tensor that `Kept.pack` was given."""
    if not isinstance(kept, _View):
        return kept
    return kept.recipe().as_strided(kept.size, kept.stride, kept.offset)
