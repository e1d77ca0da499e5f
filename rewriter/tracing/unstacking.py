"""Taking a tensor apart along a dynamic axis and putting it together again, while tracing.

`torch.cat(list(x))` is `x.flatten(0, 1)`, but a Python list has a definite length, so tracing it
would fix the size of the axis. Under `Rows` the pieces are stand-ins that only `cat` and `stack` of
all of them, in order, may use; those give the whole again, and no size is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class PiecesUsedError(TypeError):
    """The size of the axis matters to the forward: a piece is used for itself, or counted.

    A TypeError, so that `list(x)` goes on without the length that it asks for as a hint.
    """


@dataclass(frozen=True, eq=False)
class _Whole:
    tensor: Tensor
    axis: int
    count: int


_APART = (torch.unbind, Tensor.unbind)
_TOGETHER = (torch.cat, torch.concat, torch.concatenate, torch.stack)
_STACK = torch.stack


class Rows(TorchFunctionMode):
    """Keeps `unbind` followed by `cat` or `stack` from fixing the size of the axis.

    Raises:
        PiecesUsedError: a piece is read by anything else; trace again without this mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: dict[int, tuple[_Whole, int]] = {}
        self.alive: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _APART:
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if isinstance(args[0].shape[axis], torch.SymInt):
                return self._apart(args[0], axis % args[0].dim())
        if func is Tensor.__len__ and isinstance(args[0].shape[0], torch.SymInt):
            raise PiecesUsedError
        tensors = [t for t in pytree.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
        if not any(id(t) in self.pieces for t in tensors) or _is_attribute(func):
            return func(*args, **kwargs)
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        whole = self._whole(args[0]) if func in _TOGETHER else None
        if whole is None or axis != 0 or "out" in kwargs:
            raise PiecesUsedError
        first = whole.tensor.movedim(whole.axis, 0)
        return first if func is _STACK else first.flatten(0, 1)

    def _apart(self, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        size: Any = x.shape[axis]
        whole = _Whole(x, axis, int(size.node.hint))
        shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
        pieces = tuple(x.new_empty(shape) for _ in range(whole.count))
        self.alive.extend(pieces)
        self.pieces.update({id(piece): (whole, index) for index, piece in enumerate(pieces)})
        return pieces

    def _whole(self, given: Any) -> _Whole | None:
        """What a sequence of pieces makes up, if it is all of them in order."""
        if not isinstance(given, list | tuple):
            return None
        wholes = [self.pieces.get(id(p)) for p in given]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        whole = wholes[0][0] if wholes and wholes[0] is not None else None
        if whole is None or len(wholes) != whole.count or whole.tensor.dim() < 2:
            return None
        return whole if all(f == (whole, i) for i, f in enumerate(wholes)) else None


def _is_attribute(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") == "__get__"
