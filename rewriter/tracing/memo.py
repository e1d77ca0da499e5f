"""Fake evaluations remembered: layers repeat, and so do the branches that passes insert in them.

Two evaluations give the same if all that they can see is equal: what is called (a module's class,
its attributes and the shapes of its tensors, or an operator), and the operands' dtypes, devices,
strides and sizes, symbols included. Whatever else an evaluation depends on or does is not
remembered: it creates symbols or guards, draws random numbers, writes an operand, an attribute or
a stored tensor, returns a view of what it was given, or calls what this module cannot compare.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.symbols import symbols_in
from ..measure.likeness import SCALARS, SYMBOLS, IncomparableError, Likeness

LIMIT = 4096
"""Most evaluations that are remembered for one shape environment."""

_MEMOS: weakref.WeakKeyDictionary[Any, dict[Any, _Result]] = weakref.WeakKeyDictionary()
"""By fake mode. Entries hold sizes and no fake tensors, which would keep their mode alive."""


class _Extent(NamedTuple):
    """A fake tensor without its mode: a meta tensor, and the device that it is said to be on."""

    meta: Tensor
    device: torch.device


@dataclass(frozen=True)
class _Result:
    leaves: tuple[Any, ...]
    structure: Any


class _Draws(TorchDispatchMode):
    """Sees whether an evaluation draws random numbers."""

    drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class Memo:
    """The remembered evaluations of one fake mode.

    Args:
        mode: a FakeTensorMode; programs made from one another share one.
        ranges: the ranges of symbols that hold meanwhile, comparable.
    """

    def __init__(self, mode: Any, ranges: Any = ()) -> None:
        self.mode = mode
        self.ranges = ranges
        self.known = _MEMOS.setdefault(mode, {})

    def evaluate(self, what: Any, given: Any, state: Any, run: Callable[[], Any]) -> Any:
        """`run()`, or a result equal to what it would give.

        Args:
            what: the module or operator that is called.
            given: its operands, fake.
            state: the stored tensors that it reads, as a function that gives their fakes.
            run: evaluates it.
        """
        before = self._key(what, given)
        if before is None:
            return run()
        known = self.known.get(before)
        if known is not None:
            return self._recalled(known)
        seen = [t for t in pytree.tree_leaves((given, state())) if isinstance(t, Tensor)]
        versions, symbols = [t._version for t in seen], self._symbols()
        classes = _classes(what)
        with _Draws() as draws:
            result = run()
        quiet = not draws.drawn and versions == [t._version for t in seen]
        quiet = quiet and symbols == self._symbols() and classes == _classes(what)
        if quiet and self._key(what, given) == before:
            recalled = self._remembered(result, given, seen)
            if recalled is not None and len(self.known) < LIMIT:
                self.known[before] = recalled
        return result

    def _key(self, what: Any, given: Any) -> Any:
        try:
            key = Likeness()
            return self.ranges, self._symbols(), key.of(what), key.of(given)
        except IncomparableError:
            return None

    def _symbols(self) -> tuple[int, ...]:
        """What grows when an evaluation decides or creates sizes."""
        environment = self.mode.shape_env
        if environment is None:
            return ()
        tables = ("guards", "replacements", "var_to_range", "divisible")
        asserts = environment.num_deferred_runtime_asserts
        return (asserts, *(len(getattr(environment, name)) for name in tables))

    def _remembered(self, result: Any, given: Any, seen: list[Tensor]) -> _Result | None:
        """The result by its sizes; None if it is more than them."""
        leaves, structure = pytree.tree_flatten(result)
        if not symbols_in(leaves) <= symbols_in(pytree.tree_leaves(given)):
            return None
        places = {_storage(t) for t in seen}
        kept: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, SCALARS + SYMBOLS):
                kept.append(leaf)
                continue
            if not self._plain(leaf) or _storage(leaf) in places:
                return None
            places.add(_storage(leaf))
            sizes: Any = tuple(leaf.shape), leaf.stride()
            kept.append(
                _Extent(torch.empty_strided(*sizes, dtype=leaf.dtype, device="meta"), leaf.device)
            )
        return _Result(tuple(kept), structure)

    def _plain(self, leaf: Any) -> bool:
        """Whether a leaf is a fake tensor that its sizes tell all of."""
        if type(leaf) is not FakeTensor or leaf.fake_mode is not self.mode:
            return False
        odd = leaf.is_conj() or leaf.is_neg() or leaf.requires_grad or leaf.constant is not None
        return not odd and leaf.layout is torch.strided and isinstance(leaf.storage_offset(), int) \
            and leaf.storage_offset() == 0  # fmt: skip

    def _recalled(self, known: _Result) -> Any:
        leaves = [self._fake(leaf) if type(leaf) is _Extent else leaf for leaf in known.leaves]
        return pytree.tree_unflatten(leaves, known.structure)

    def _fake(self, extent: _Extent) -> FakeTensor:
        """A tensor of its own: what torch notes on it (sizes that depend on values) is not that
        of others."""
        return FakeTensor(self.mode, extent.meta.detach(), extent.device)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _classes(what: Any) -> Any:
    """The attributes of the classes of a module and of all below."""
    if not isinstance(what, nn.Module):
        return ()
    return [dict(vars(kind)) for kind in {type(m): None for m in what.modules()}]


@functools.cache
def repeats(target: Any) -> bool:
    """Whether an operator's result depends on its operands' sizes alone, and is worth a memo."""
    if not isinstance(target, torch._ops.OpOverload) or target is operator.getitem:
        return False
    schema = target._schema
    aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
    return not aliases and torch.Tag.nondeterministic_seeded not in target.tags
