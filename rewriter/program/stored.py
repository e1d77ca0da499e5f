"""One row of the table of stored tensors: all that is known of a tensor beside its values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PassError, nearest
from ..graph.sharded import equal, whole
from .readers import Readers
from .state import State


@dataclass(frozen=True)
class Stored:
    """What a program knows of a stored tensor.

    Attributes:
        name: that it is stored under.
        names: all of its names in the original model, that one first.
        shape, dtype: of its values.
        readers: the calls that compute with it, each with the module that it was traced in.
        overlapping: other tensors that share memory with it.
        owner: the adapter that trains it, '' where the user does, None where nobody does.
        added: a pass made it, the original model has none of that name.
        before: its values at capture, None where they are what they were.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    readers: tuple[str, ...]
    overlapping: tuple[str, ...]
    owner: str | None
    added: bool
    before: Tensor | None

    def __str__(self) -> str:
        read = ", ".join(self.readers) or "nothing"
        parts = [f"{str(self.dtype)[6:]}{list(self.shape)}", f"read by {read}"]
        if self.names[1:]:
            parts.append(f"also called {', '.join(self.names[1:])}")
        if self.overlapping:
            parts.append(f"shares memory with {', '.join(self.overlapping)}")
        if self.owner is not None:
            parts.append(f"trained by {self.owner or 'the program itself'}")
        if self.added:
            parts.append("added by a pass")
        if self.before is not None:
            parts.append("changed since capture")
        return f"{self.name}: {'; '.join(parts)}"


def stored(program: State, name: str) -> Stored:
    """The row of a tensor.

    Args:
        name: any of its names in the original model, or that of a branch's tensor.

    Raises:
        PassError: the program has no such tensor.
    """
    own = program.tensors.stored(name)
    module = program.module
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if own not in tensors:
        raise PassError(
            f"the program stores no tensor {name!r}. Nearest: {nearest(name, tensors)}; "
            "program.text() shows all that it reads."
        )
    tensor, readers = tensors[own], Readers(program)
    base = program.base.base_tensors().get(own)
    here = whole(tensor)
    moved = base is not None and not (
        base.is_meta or (base.shape == here.shape and equal(base.to(here.dtype), here))
    )
    return Stored(
        own, tuple(program.tensors.names(own)), tuple(tensor.shape), tensor.dtype,
        tuple(str(r) for r in readers.of(own)), tuple(readers.overlapping(own)),
        program.tensors.owner(own), own in program.tensors.added, base if moved else None,
    )  # fmt: skip
