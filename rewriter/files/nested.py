"""Nested states as tensors by path and strict JSON for the rest, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by the JSON text of their path, and `[path, item]` for everything else."""
    tensors: dict[str, Tensor] = {}
    rest: list[Any] = []
    for path, item in _leaves(state):
        if isinstance(item, Tensor):
            tensors[json.dumps(path)] = item.detach()
        else:
            rest.append([path, item])
    return tensors, rest


def is_path(path: Any) -> bool:
    """Whether this is where `flatten` says that something is."""
    return isinstance(path, list) and bool(path) and all(type(k) in (str, int) for k in path)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def nest(tensors: Mapping[str, Tensor], rest: Iterable[Any]) -> dict[str, Any]:
    """The state that `flatten` took apart.

    Raises:
        ValueError: a path is none, or two contradict each other.
    """
    state: dict[str, Any] = {}
    for path, item in [*((json.loads(n), t) for n, t in tensors.items()), *rest]:
        if not is_path(path):
            raise ValueError(f"{path!r} is no path into a state")
        inner: Any = state
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{path!r} leads through something that has no parts")
        if path[-1] in inner:
            raise ValueError(f"{path!r} is there twice")
        inner[path[-1]] = item
    return state


def _leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, item in state.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, (*path, key))  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield [*path, key], item
