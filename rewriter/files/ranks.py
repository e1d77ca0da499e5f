"""Ranks acting as one: what one of them cannot do fails on all, and what differs is found.

Everything here works without a process group too, as a job of one rank. Text and numbers travel as
bytes of JSON in tensors, so that no rank unpickles what another one sends.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RanksError, RewriteError

T = TypeVar("T")
_FAILURES = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def world() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def exchange(item: Any) -> list[Any]:
    """What every rank gives, in their order.

    Args:
        item: strict JSON.
    """
    if world() == 1:
        return [item]
    mine = torch.tensor(list(json.dumps(item).encode()), dtype=torch.uint8, device=_device())
    sizes = _gather(torch.tensor([mine.numel()], device=_device()))
    padded = mine.new_zeros(int(max(int(s) for s in sizes)))
    padded[: mine.numel()] = mine
    texts = [t[: int(s)] for t, s in zip(_gather(padded), sizes, strict=True)]
    return [json.loads(bytes(t.tolist()).decode()) for t in texts]


def _gather(tensor: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(gathered, tensor)
    return gathered


def _device() -> torch.device:
    if dist.get_backend() in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def together(what: str, work: Callable[[], T]) -> T:
    """Does something on every rank; if it fails on one, it fails on all.

    Args:
        what: what is being done, for the error ("saving the adapters").

    Raises:
        RanksError: it failed on another rank; where it failed, the error itself is raised.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except (RewriteError, *_FAILURES) as error:
        failure = error
    said = exchange(f"{type(failure).__name__}: {failure}" if failure is not None else "")
    if failure is not None:
        raise failure
    for other, message in enumerate(said):
        if message:
            raise RanksError(
                f"{what} failed on rank {other} of {len(said)}, so no rank did it. {message}"
            )
    return result  # pyright: ignore[reportReturnType]


def first(what: str, work: Callable[[], None]) -> None:
    """Does something on rank 0 while the others wait; if it fails there, it fails on all."""
    together(what, work if rank() == 0 else lambda: None)


def agree(what: str, item: Any) -> None:
    """Checks that something is the same on all ranks.

    Args:
        what: a few words for the error ("the recipe").
        item: strict JSON.

    Raises:
        RanksError: on every rank, with what the first two that differ have.
    """
    answers = exchange(item)
    other = next((i for i, there in enumerate(answers) if there != answers[0]), None)
    if other is None:
        return
    here, there, where = answers[0], answers[other], ""
    if isinstance(here, dict) and isinstance(there, dict):
        sides: tuple[dict[str, Any], dict[str, Any]] = here, there
        key = next(k for k in sorted({*here, *there}) if sides[0].get(k) != sides[1].get(k))
        here, there, where = sides[0].get(key), sides[1].get(key), f", first at {key!r}"
    raise RanksError(
        f"{what} differs between ranks{where}: rank 0 has {_short(here)}, rank {other} has "
        f"{_short(there)}. Build the same on every rank: same model, same recipe, same seed."
    )


def _short(item: Any, limit: int = 200) -> str:
    text = item if isinstance(item, str) else json.dumps(item)
    return text if len(text) <= limit else f"{text[:limit]}..."
