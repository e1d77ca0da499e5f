"""Walks over modules as torch has them, in one loop each: large programs have many modules."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Self

from torch import Tensor, nn


class Walked(nn.Module):
    """A module that is walked over in loops, without a generator or a call for every level."""

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """As torch's own, without a generator for every level: all other walks use it."""
        memo = set() if memo is None else memo
        stack: list[tuple[str, nn.Module]] = [(prefix, self)]
        while stack:
            path, module = stack.pop()
            if remove_duplicate and module in memo:
                continue
            if type(module).named_modules not in (nn.Module.named_modules, _NAMED):
                yield from module.named_modules(memo, path, remove_duplicate)
                continue
            memo.add(module)
            yield path, module
            start = f"{path}." if path else ""
            children = [(f"{start}{n}", m) for n, m in module._modules.items() if m is not None]
            stack += reversed(children)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's own, in one loop."""
        if not recurse:
            return super().named_parameters(prefix, recurse, remove_duplicate)
        return _members(self, "_parameters", prefix, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As torch's own, in one loop."""
        if not recurse:
            return super().named_buffers(prefix, recurse, remove_duplicate)
        return _members(self, "_buffers", prefix, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's own, from the tables of children alone."""
        child: nn.Module | None = self
        for part in target.split("."):
            child = child._modules.get(part) if child is not None else None
        return super().get_submodule(target) if child is None else child

    def train(self, mode: bool = True) -> Self:
        """As torch's own; modules that have one of their own are asked."""
        own: dict[str, Any] = self.__dict__
        own["training"] = mode
        stack = [m for m in self._modules.values() if m is not None]
        while stack:
            module = stack.pop()
            if type(module).train not in (nn.Module.train, Walked.train):
                module.train(mode)
                continue
            own = module.__dict__
            own["training"] = mode
            stack += [m for m in module._modules.values() if m is not None]
        return self


_NAMED = Walked.named_modules


def _members(root: nn.Module, table: str, prefix: str, once: bool) -> Iterator[tuple[str, Any]]:
    seen: set[Any] = set()
    for path, module in root.named_modules(prefix=prefix, remove_duplicate=once):
        for name, tensor in getattr(module, table).items():
            if tensor is None or tensor in seen:
                continue
            if once:
                seen.add(tensor)
            yield (f"{path}.{name}" if path else name), tensor


def stored(module: nn.Module) -> list[tuple[str, Tensor]]:
    """`named_parameters`, then `named_buffers`, of one walk."""
    parameters: dict[Tensor, str] = {}
    buffers: dict[Tensor, str] = {}
    for path, each in module.named_modules():
        start = f"{path}." if path else ""
        for names, table in ((parameters, each._parameters), (buffers, each._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    names.setdefault(tensor, f"{start}{name}")
    return [(name, tensor) for names in (parameters, buffers) for tensor, name in names.items()]
