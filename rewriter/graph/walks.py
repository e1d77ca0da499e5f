"""Walks over modules as torch has them, in one loop each: large programs have many modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Self, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Walk:
    """What walks over a module find, as long as it holds what it does now."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.named_modules())
        self.by_path = dict(self.modules)
        self.facts: dict[str, Any] = {}
        self._units = any(hasattr(kind, "unshard") for kind in {type(m) for _, m in self.modules})

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """As `named_parameters`."""
        return self._tensors("_parameters")

    @property
    def buffers(self) -> list[tuple[str, Tensor]]:
        """As `named_buffers`."""
        return self._tensors("_buffers")

    def _tensors(self, table: str) -> list[tuple[str, Any]]:
        if table not in self.facts or self._units:  # units gather parameters, and give them back
            self.facts[table] = list(_tensors(self.modules, table, True))
        return self.facts[table]


_SETTLED: ContextVar[dict[nn.Module, Walk]] = ContextVar("_SETTLED")


@contextlib.contextmanager
def settled(*roots: nn.Module) -> Generator[None]:
    """Walks over these modules only once while it lasts: nobody adds or removes modules, tensors or
    nodes meanwhile (values, flags and modes may change)."""
    known = _SETTLED.get({})
    token = _SETTLED.set(known | {r: Walk(r) for r in roots if r not in known})
    try:
        yield
    finally:
        _SETTLED.reset(token)


def settle(root: nn.Module) -> None:
    """`settled` for a module that was made just now, as long as that of others lasts."""
    if (known := _SETTLED.get({})) and root not in known:
        known[root] = Walk(root)


def _walk(root: nn.Module) -> Walk | None:
    known = _SETTLED.get({})
    return known.get(root) if known else None


def fact(root: nn.Module, name: str, compute: Callable[[], T]) -> T:
    """What is computed of a module, or of its graph: only once where that is `settled`."""
    walk = _walk(root)
    if walk is None:
        return compute()
    if name not in walk.facts:
        walk.facts[name] = compute()
    return walk.facts[name]


class Walked(nn.Module):
    """A module that is walked over in loops, without a generator or a call for every level."""

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """As torch's own, without a generator for every level: all other walks use it."""
        walk = _walk(self) if memo is None and not prefix and remove_duplicate else None
        if walk is not None:
            return (each for each in walk.modules)
        return _walked(self, set() if memo is None else memo, prefix, remove_duplicate)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's own, in one loop."""
        if not recurse:
            return super().named_parameters(prefix, recurse, remove_duplicate)
        walk = _walk(self) if not prefix and remove_duplicate else None
        if walk is not None:
            return iter(walk.parameters)
        return _members(self, "_parameters", prefix, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As torch's own, in one loop."""
        if not recurse:
            return super().named_buffers(prefix, recurse, remove_duplicate)
        walk = _walk(self) if not prefix and remove_duplicate else None
        if walk is not None:
            return iter(walk.buffers)
        return _members(self, "_buffers", prefix, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's own, from the tables of children alone."""
        walk = _walk(self)
        if walk is not None and target in walk.by_path:
            return walk.by_path[target]
        child: nn.Module | None = self
        for part in target.split("."):
            child = child._modules.get(part) if child is not None else None
        return super().get_submodule(target) if child is None else child

    def train(self, mode: bool = True) -> Self:
        """As torch's own; modules that have one of their own are asked."""
        plain, other = fact(self, "train", lambda: _by_train(self))
        for own in plain:
            own["training"] = mode
        for module in other:
            module.train(mode)
        return self


_NAMED = Walked.named_modules


def _members(root: nn.Module, table: str, prefix: str, once: bool) -> Iterator[tuple[str, Any]]:
    return _tensors(root.named_modules(prefix=prefix, remove_duplicate=once), table, once)


def _tensors(
    modules: Iterable[tuple[str, nn.Module]], table: str, once: bool
) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in modules:
        for name, tensor in module.__dict__[table].items():
            if tensor is None or id(tensor) in seen:
                continue
            if once:
                seen.add(id(tensor))
            yield (f"{path}.{name}" if path else name), tensor


def stored(module: nn.Module) -> list[tuple[str, Tensor]]:
    """`named_parameters`, then `named_buffers`."""
    walk = _walk(module)
    if walk is not None:
        return [*walk.parameters, *walk.buffers]
    modules = list(module.named_modules())
    return [*_tensors(modules, "_parameters", True), *_tensors(modules, "_buffers", True)]


def _by_train(root: nn.Module) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """The attributes of the modules with torch's `train`, and the topmost others."""
    plain, other = [root.__dict__], list[nn.Module]()
    stack = [m for m in root._modules.values() if m is not None]
    while stack:
        module = stack.pop()
        if type(module).train not in (nn.Module.train, Walked.train):
            other.append(module)
            continue
        plain.append(module.__dict__)
        stack += [m for m in module._modules.values() if m is not None]
    return plain, other


def _walked(
    root: nn.Module, memo: set[nn.Module], prefix: str, remove_duplicate: bool
) -> Generator[tuple[str, nn.Module], None, None]:
    stack: list[tuple[str, nn.Module]] = [(prefix, root)]
    while stack:
        path, module = stack.pop()
        if remove_duplicate and module in memo:
            continue
        if type(module).named_modules not in (nn.Module.named_modules, _NAMED):
            yield from module.named_modules(memo, path, remove_duplicate)
            continue
        memo.add(module)
        yield path, module
        if children := module._modules:
            start = f"{path}." if path else ""
            below = [(f"{start}{n}", m) for n, m in children.items() if m is not None]
            stack += reversed(below)
