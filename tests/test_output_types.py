"""Outputs of types that torch knows without the keys of their parts, such as diffusers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftfx.rewriter.measure.compare import compare


class Pair:
    """Two tensors."""

    def __init__(self, one: Tensor, two: Tensor) -> None:
        self.one, self.two = one, two


def _parts(pair: Pair) -> tuple[list[Any], None]:
    return [pair.one, pair.two], None


pytree.register_pytree_node(Pair, _parts, lambda parts, _: Pair(*parts))


def test_parts_without_keys_are_numbered() -> None:
    x = torch.ones(3)
    first, second = compare(Pair(x, x), Pair(x, 2 * x))
    assert (first.name, second.name) == ("[0]", "[1]")
    assert (first.absolute, second.absolute) == (0.0, 1.0)
