"""Branches that do nothing for a while, in a still copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from ..branches.branch import Delta, Expression, RowScale, Scale, Serial
from ..graph.aten import ATEN, is_op
from ..graph.module import CapturedModule
from .direct import Direct


@contextlib.contextmanager
def silenced(
    gm: CapturedModule, paths: Collection[str], only_added: bool = False
) -> Iterator[None]:
    """Lets the branches at these paths do nothing, where their slot has a word for that.

    Args:
        only_added: all that reads what a delta returns adds it, so that one zero is enough; where
            the graph shows that, they are not called at all.
    """
    silent: list[Any] = []
    whole: Any = gm
    if only_added and (instead := _instead(gm, frozenset(paths))) is not None:
        whole.forward = Direct(gm, instead)
        silent.append(whole)
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


def _instead(gm: CapturedModule, paths: Collection[str]) -> dict[Node, Node | None] | None:
    """The nodes that do nothing while these branches rest, with what their readers read instead;
    None where there is more to it."""
    instead: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or node.target not in paths:
            continue
        module = gm.get_submodule(str(node.target))
        if getattr(module, "lowered", None) is not None:
            return None
        if isinstance(module, Delta):
            sums = [u for u in node.users if _adds(u, node)]
            if len(sums) != len(node.users):
                return None
            instead |= {u: u.args[0] for u in sums} | {node: None}
        elif isinstance(module, RowScale | Scale) or (
            isinstance(module, Serial) and len(node.args) == 1 and "skip" not in node.kwargs
        ):
            instead[node] = node.args[0]
        else:
            return None
    return instead


def _adds(node: Node, update: Node) -> bool:
    if not is_op(node, ATEN.add.Tensor) or node.kwargs or len(node.args) != 2:
        return False
    value, added = node.args
    return added is update and isinstance(value, Node) and value is not update


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
    lowered = getattr(getattr(forward, "__self__", None), "lowered", None) is not None

    def silent(*w: Any, **_: Any) -> Any:
        if lowered and len(w) > 1:  # beside its linear: x, weight, bias
            return F.linear(*w)
        return w[0] if len(w) == 1 else w

    return silent


def _no_update(forward: Forward) -> Forward:
    del forward
    return lambda h, skip=True, **_: h if skip else torch.zeros_like(h)


_NEUTRAL: tuple[tuple[type[nn.Module], Callable[[Forward], Forward]], ...] = (
    (Delta, _no_delta), (RowScale, _no_rows), (Scale, _first), (Expression, _as_stored),
    (Serial, _no_update),
)  # fmt: skip
