"""Branches that do nothing for a while, in a still copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..branches.branch import Delta, Expression, RowScale, Scale, Serial


@contextlib.contextmanager
def silenced(gm: nn.Module, paths: Collection[str], only_added: bool = False) -> Iterator[None]:
    """Lets the branches at these paths do nothing, where their slot has a word for that.

    Args:
        only_added: all that reads what a delta returns adds it, so that one zero is enough.
    """
    silent: list[Any] = []
    try:
        for path in paths:
            module: Any = gm.get_submodule(path)
            for kind, neutral in _NEUTRAL:
                if isinstance(module, kind):
                    neutral = _zero if kind is Delta and only_added else neutral
                    module.forward = neutral(module.forward)
                    silent.append(module)
        yield
    finally:
        for module in silent:
            del module.forward


Forward = Callable[..., Any]


def _zero(forward: Forward) -> Forward:
    del forward
    return lambda x, *_, **__: x.new_zeros(())


def _no_delta(forward: Forward) -> Forward:
    def silent(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **reads: Tensor
    ) -> Tensor:
        if weight is not None:
            return F.linear(x, weight, bias)
        return torch.zeros_like(forward(x, **reads))

    return silent


def _no_rows(forward: Forward) -> Forward:
    def silent(
        y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, **operands: Tensor
    ) -> Tensor:
        del operands
        lowered = getattr(getattr(forward, "__self__", None), "lowered", None)
        return y if lowered is None else F.linear(x, weight, bias)

    return silent


def _first(forward: Forward) -> Forward:
    del forward
    return lambda x, *_, **__: x


def _as_stored(forward: Forward) -> Forward:
    del forward
    return lambda *w, **_: w[0] if len(w) == 1 else w


def _no_update(forward: Forward) -> Forward:
    del forward
    return lambda h, skip=True, **_: h if skip else torch.zeros_like(h)


_NEUTRAL: tuple[tuple[type[nn.Module], Callable[[Forward], Forward]], ...] = (
    (Delta, _no_delta), (RowScale, _no_rows), (Scale, _first), (Expression, _as_stored),
    (Serial, _no_update),
)  # fmt: skip
