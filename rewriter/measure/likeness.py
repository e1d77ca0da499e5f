"""What two calls of a module or operator must share to run the same code: its class and attributes,
and the sizes of all tensors, not their values."""

from __future__ import annotations

import enum
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..graph.aten import attribute
from ..graph.module import CapturedModule, same_view
from .compare import equal_bits

SCALARS = (type(None), bool, int, float, complex, str, bytes, range)
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (
    type, types.FunctionType, types.BuiltinFunctionType, enum.Enum, torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip
"""What is compared by being the same object, and cannot change what it is."""

_SEQUENCES = (tuple, list, slice, set, frozenset, immutable_list)
_MAPPINGS = (dict, OrderedDict, immutable_dict)


class IncomparableError(Exception):
    """Something has no key: an object that may change without anyone seeing it."""


class Likeness:
    """Makes keys; what was met before is known by its place, so what is shared is part of them.

    `tensors` are those met so far.
    """

    def __init__(self) -> None:
        self.met: dict[int, int] = {}
        self.tensors: list[Tensor] = []

    def of(self, item: Any) -> Any:
        """A hashable that is equal for what evaluates in the same way.

        Raises:
            IncomparableError: nothing tells.
        """
        kind = type(item)
        if kind in SCALARS:
            return kind, item
        if kind in SYMBOLS:
            return kind, item.node.expr
        if isinstance(item, _CONSTANTS):
            return item
        if id(item) in self.met:
            return Likeness, self.met[id(item)]
        self.met[id(item)] = len(self.met)
        if isinstance(item, Tensor):
            self.tensors.append(item)
            return self._tensor(item)
        if isinstance(item, nn.Module):
            return kind, self._mapping(vars(item))
        if is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return kind, self._mapping(vars(item))
        if kind in _SEQUENCES:
            return kind, tuple(map(self.of, self._items(item)))
        if kind in _MAPPINGS:
            return kind, self._mapping(item)
        raise IncomparableError

    def _items(self, item: Any) -> Iterator[Any]:
        if isinstance(item, slice):
            return iter((item.start, item.stop, item.step))
        if isinstance(item, set | frozenset):
            # Of what else a set holds, the order could tell two equal ones apart.
            if not all(isinstance(i, str) for i in item):
                raise IncomparableError
            return iter(sorted(item))
        return iter(item)

    def _mapping(self, items: Mapping[Any, Any]) -> Any:
        return tuple((self.of(name), self.of(value)) for name, value in items.items())

    def _tensor(self, tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
            raise IncomparableError
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            raise IncomparableError
        if getattr(tensor, "constant", None) is not None:  # a fake one whose values are known
            raise IncomparableError
        sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        return (
            type(tensor), tensor.dtype, tensor.device, tensor.requires_grad,
            tuple(s if isinstance(s, int) else s.node.expr for s in sizes),
        )  # fmt: skip


def runs_alike(one: CapturedModule, other: CapturedModule) -> bool:
    """Whether two modules compute the same, because they run the same code over equal tensors.

    False also where that cannot be told.
    """
    names = {str(n.target) for n in one.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in one.graph.nodes if n.op == "call_module"}
    if one.code != other.code:
        return False
    mine, theirs = Likeness(), Likeness()
    try:
        for path in sorted(called):
            if mine.of(one.get_submodule(path)) != theirs.of(other.get_submodule(path)):
                return False
    except IncomparableError:
        return False
    tensors = list(zip(mine.tensors, theirs.tensors, strict=True))
    tensors += ((attribute(one, name), attribute(other, name)) for name in sorted(names))
    return all(same_view(x) == same_view(y) or equal_bits(x, y) for x, y in tensors)
