"""What a pass may allocate: tensors are refused before torch makes them.

A size that a user mistyped, or a manifest that anybody wrote, must not end the process or its
neighbours: an operating system that overcommits grants memory that it does not have.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 1 << 24
"""Bytes for which nobody is asked what memory is left."""

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_GROUPS = (  # version 2, then 1: limit, use, and what of the use is given back on demand
    (_CGROUP, "memory.max", "memory.current", ("inactive_file", "active_file")),
    (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     ("total_inactive_file", "total_active_file")),
)  # fmt: skip


class UnexplainedError(MemoryError):
    """More is made than what is there already explains."""


class Allocation(TorchDispatchMode):
    """Counts the tensors that are made from sizes, and refuses those for which there is no room.

    Args:
        elements: how many may be made from sizes in all; None: as many as memory holds.

    Raises:
        MemoryError: (UnexplainedError) from the operator that asks for too much, before it runs.
    """

    def __init__(self, elements: int | None = None) -> None:
        super().__init__()
        self.elements, self.made = elements, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what runs under it is not compiled; keeping torch's compiler out costs more

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        from_sizes, pointwise = _makes(func)
        if (from_sizes or pointwise) and all(t in (Tensor, nn.Parameter) for t in types):
            self._admit(func, args, kwargs, from_sizes, pointwise)
        return func(*args, **kwargs)

    def _admit(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        from_sizes: bool,
        pointwise: bool,
    ) -> None:
        operands = [a for a in args if isinstance(a, Tensor)]
        device = kwargs.get("device") or (operands[0].device if operands else _CPU)
        device = device if isinstance(device, torch.device) else torch.device(device)
        if device.type == "meta":
            return
        size = _from_sizes(func, args, kwargs) if from_sizes else 0
        self.made += size
        if self.elements is not None and self.made > self.elements:
            raise UnexplainedError(f"{self.made:,} elements, at most {self.elements:,} expected")
        if device.type != "cpu":  # torch's own error is clear there
            return
        dtype = kwargs.get("dtype") or (
            operands[0].dtype if operands else torch.get_default_dtype()
        )
        count = _broadcast(operands) if pointwise and len(operands) > 1 else 0
        require_room(max(size, count) * dtype.itemsize)


_CPU = torch.device("cpu")


@functools.cache
def _makes(func: Any) -> tuple[bool, bool]:
    """Whether an operator may make a new tensor of numbers, and one that its operands span."""
    schema = func._schema
    if any(r.alias_info is not None for r in schema.returns):
        return False, False
    names = {a.name for a in schema.arguments}
    from_sizes = bool(names & {"size", "repeats"}) or schema.name == "aten::arange"
    return from_sizes, torch.Tag.pointwise in func.tags


def require_room(size: int) -> None:
    """Raises MemoryError if so many bytes are more than this process can still have."""
    left = available() if size > _SMALL else None
    if left is not None and size > left:
        raise MemoryError(f"{size / 2**30:.3g} GiB are needed, {left / 2**30:.3g} GiB left")


def available() -> int | None:
    """Bytes that the system and the control groups of this process have left; None: unknown."""
    limits = [*_of_system(), *_of_groups()]
    return min(limits) if limits else None


def _of_system() -> Iterable[int]:
    for line in _read(_PROC / "meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            yield int(rest.split()[0]) * 1024


def _of_groups() -> Iterable[int]:
    own = [line.split(":", 2) for line in _read(_PROC / "self" / "cgroup").splitlines()]
    for mount, limit, use, cached in _GROUPS:
        mine = [p for _, kinds, p in own if kinds == "" or "memory" in kinds.split(",")]
        for path in {"/", *(str(parent) for p in mine for parent in (Path(p), *Path(p).parents))}:
            folder = mount / path.strip("/")
            most, used = _read(folder / limit).strip(), _read(folder / use).strip()
            if not (most.isdigit() and used.isdigit()):
                continue
            said = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            yield int(most) - int(used) + sum(int(said.get(name, 0)) for name in cached)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _from_sizes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Elements of what an operator makes of numbers alone; 0 for others."""
    schema = func._schema
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    size = given.get("size")
    if isinstance(size, list | tuple):
        return math.prod(n for n in size if isinstance(n, int))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    repeats, start = given.get("repeats"), given.get("self")
    if isinstance(repeats, list | tuple) and isinstance(start, Tensor):
        return start.numel() * math.prod(n for n in repeats if isinstance(n, int))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if schema.name == "aten::arange":
        first, last, step = given.get("start", 0), given.get("end", 0), given.get("step", 1)
        numbers = all(isinstance(n, int | float) for n in (first, last, step))
        return max(0, math.ceil((last - first) / step)) if numbers and step else 0
    return 0


def _broadcast(tensors: Sequence[Tensor]) -> int:
    """Elements of what a pointwise operator makes of tensors."""
    shapes = [t.shape for t in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return tensors[0].numel()
    axes = itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return math.prod(max(sizes) for sizes in axes)
