"""What a prompt puts in front of a graph's inputs, and takes off its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...branches.prompts import Tokens
from ...errors import PassError
from ...graph.aten import inputs, shape, submodule, value


class PadTokens(nn.Module):
    """Adds `length` entries with a fixed value in front of an axis of `[batch, tokens]`, or of
    `[tokens, batch]`."""

    keeps_axes = True

    def __init__(self, length: int, fill: float, axis: int = 1) -> None:
        super().__init__()
        self.length, self.fill, self.axis = length, fill, axis

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == 0:
            x = x.mT
        left = torch.full_like(x[:, :1], self.fill).expand(-1, self.length)
        longer = torch.cat([left, x], dim=1)
        return longer.mT if self.axis == 0 else longer

    def extra_repr(self) -> str:
        return f"length={self.length}, fill={self.fill:g}{_first(self.axis)}"


class PadPositions(nn.Module):
    """Positions 0..length-1 for the prompt; the given ones move behind it."""

    keeps_axes = True

    def __init__(self, length: int, axis: int = 1) -> None:
        super().__init__()
        self.length, self.axis = length, axis

    def forward(self, positions: Tensor) -> Tensor:
        if self.axis == 0:
            positions = positions.mT
        own = torch.arange(self.length, dtype=positions.dtype, device=positions.device)
        longer = torch.cat([own.expand(positions.shape[0], -1), positions + self.length], dim=1)
        return longer.mT if self.axis == 0 else longer

    def extra_repr(self) -> str:
        return f"length={self.length}{_first(self.axis)}"


def _first(axis: int) -> str:
    return "" if axis else ", tokens first"


class StripTokens(nn.Module):
    """Removes the prompt's positions from the given axes."""

    keeps_axes = True

    def __init__(self, length: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.length, self.axes = length, axes

    def forward(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = x.narrow(axis, self.length, x.shape[axis] - self.length)
        return x

    def extra_repr(self) -> str:
        return f"length={self.length}, axes={self.axes}"


class InsertedCausal(nn.Module):
    """The mask of causal attention on `length` inserted tokens and those of the stream, for
    queries `[..., all, width]`: `[all, all]` booleans. The inserted ones see what the first token
    sees, itself, and one another, and are seen by all."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, query: Tensor) -> Tensor:
        count = query.shape[-2]
        place = torch.arange(count, device=query.device)
        return place[None] <= place.clamp(min=self.length)[:, None]

    def extra_repr(self) -> str:
        return f"length={self.length}"


def longer_prompts(gm: GraphModule, symbol: str, prompt: Tokens) -> tuple[int, Any]:
    """Makes room for one more prompt, in front of those on tokens whose number is `symbol`.

    Returns:
        How long all are together, and the number of tokens without them; None where this prompt is
        the first one.

    Raises:
        PassError: one of several prompts is where the stream begins, behind the positions.
    """
    length = prompt.length
    total, size = length, None
    places = {prompt.place}
    for node in gm.graph.nodes:
        module: Any = submodule(gm, node)
        if isinstance(module, PadTokens | PadPositions) and symbol in _sizes(node):
            size = value(inputs(node)[0]).shape[module.axis]
            module.length = total = module.length + length
        elif isinstance(module, StripTokens) and symbol in _sizes(inputs(node)[0]):
            module.length += length
        elif isinstance(module, Tokens) and symbol in _sizes(node):
            module.front += length
            places.add(module.place)
    if total > length and places != {"input"}:
        raise PassError(
            "a prompt where the stream begins, behind the positions, stands alone. Remove the "
            "other one first, or use two in front of the input."
        )
    return total, size


def _sizes(node: Any) -> list[str]:
    return [str(s) for s in shape(node) or ()]
