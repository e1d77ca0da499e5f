"""What runs a region on some of its tokens, or on further ones: the branch that chooses or adds
them, and the modules around.

    index, weight, live, aside = choose(x)
    y = x + aside + scatter(weight * (region(take(x, index)) - take(x, index)), index)

Every size stays symbolic: of n tokens a region gets `slots(n, reduction)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .branch import Branch


def slots(tokens: Any, reduction: int) -> Any:
    """How many tokens the region runs on: ceil(tokens / reduction), and 2 at least.

    A size that may be 1 would have to be told apart from a broadcast axis in every trace. Where
    one token is taken of all rows, the second slot repeats it: a softmax over its keys alone does
    not notice, and its update has weight 0. (Beside prefix keys and without a padding mask, it
    would count twice, in inputs of at most `reduction` tokens.)
    """
    return torch.sym_max(2, (tokens + reduction - 1) // reduction)


class Routed(Branch):
    """Chooses the tokens that a region runs on, and what all tokens get beside it.

    Of every row's n valid tokens, the k = ceil(n / reduction) with the largest scores are taken.
    """

    slot = "routed"
    not_foldable = "which tokens it takes depends on the input"
    chooses_sizes = True
    """Its outputs have a size of their own, which shape propagation keeps as it was made."""

    tokens_first: bool = False
    """It is given `[tokens, batch, width]`."""

    def __init__(self, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction

    def scores(self, x: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """How much each token wants to be taken: `[batch, tokens, width] -> [batch, tokens]`."""
        raise NotImplementedError

    def weights(self, scores: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
        """What multiplies the updates, `[batch, tokens]`; gradients reach `scores` through it.

        Args:
            scores: `[batch, tokens]`.
            count: `[batch, 1]`, how many tokens are taken.
            valid: `[batch, tokens]` booleans, or None where no token is padding.
        """
        raise NotImplementedError

    def aside(self, x: Tensor, /, *_: Any, **reads: Any) -> Tensor:
        """What is added to every token, `[batch, tokens, width]`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, valid: Tensor | None = None, **reads: Tensor
    ) -> tuple[Tensor, ...]:
        """Chooses.

        Args:
            x: `[batch, tokens, width]`, what the region's first linear reads, or with
                `tokens_first` `[tokens, batch, width]`.
            valid: booleans `[batch, tokens]`, or None where no token is padding.
            reads: what else `scores` and `aside` read; both get all of it.

        Returns:
            index `[batch, slots]` of the taken tokens in their order, their weights and whether
            the slot is in use (both `[batch, slots]`), and `aside(x)`. A slot not in use (in rows
            with fewer valid tokens than others) repeats a taken token with weight 0.
        """
        x = x.transpose(0, 1) if self.tokens_first else x
        scores = self.scores(x, **reads)
        count = self._count(scores, valid)
        slot = torch.arange(slots(scores.shape[1], self.reduction), device=x.device)
        index = _largest(scores.detach(), count, valid).gather(1, slot.minimum(count - 1))
        live = slot < count
        weights = self.weights(scores, count, valid).gather(1, index) * live
        aside = self.aside(x, **reads)
        aside = aside.transpose(0, 1) if self.tokens_first else aside
        return index, weights.to(x.dtype), live, aside

    def _count(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        """How many tokens each row takes, `[batch, 1]`; 1 at least, also of padding alone."""
        kept = torch.ones_like(scores, dtype=torch.long) if valid is None else valid.long()
        tokens = kept.sum(1, keepdim=True)
        return ((tokens + self.reduction - 1) // self.reduction).clamp(min=1)


def _largest(scores: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
    """Where the `count [batch, 1]` largest scores are, in order, and then anything: `[batch,
    tokens]`. Of equal scores the first ones are taken, whatever the sort does with ties."""
    if valid is not None:
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    least = scores.sort(1, descending=True)[0].gather(1, count - 1)
    above, equal = scores > least, scores == least
    left = count - above.long().sum(1, keepdim=True)
    taken = above | (equal & (equal.long().cumsum(1) <= left))
    place = torch.arange(scores.shape[1], device=scores.device)
    last = scores.shape[1] - 1  # also where scores are NaN and none is taken
    return torch.where(taken, place, scores.shape[1]).sort(1)[0].clamp(max=last)


class Inserted(Branch):
    """Vectors in front of the tokens of a region, which leave the stream where the region ends.

    They stand where the first real token of their row stands: at its position, and seen by what
    sees it.
    """

    slot = "inserted"
    reads = writes = "width"
    not_foldable = "tokens in the stream are no weights"
    chooses_sizes = True
    """It returns more tokens than it is given, whose number is kept as it was made."""

    tokens_first: bool = False
    """It is given `[tokens, batch, width]`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def rows(self, *_: Any, **reads: Any) -> Tensor:
        """The vectors from what is read alone: `[length, width]`, or `[batch, length, width]`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, valid: Tensor | None = None, **reads: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The longer stream, laid out like `x`, and which of the tokens each of its own stands
        for, `[batch, length + tokens]`.

        Args:
            x: `[batch, tokens, width]`, or with `tokens_first` `[tokens, batch, width]`.
            valid: booleans `[batch, tokens]`, or None where no token is padding.
        """
        x = x.transpose(0, 1) if self.tokens_first else x
        rows = self.rows(**reads).to(x.dtype).expand(x.shape[0], -1, -1)
        longer = torch.cat([rows, x], 1)
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        first = own[:, :1] if valid is None else valid.long().argmax(1, keepdim=True)
        index = torch.cat([first.expand(-1, self.length), own], 1)
        return longer.transpose(0, 1) if self.tokens_first else longer, index


class TakeTokens(nn.Module):
    """Keeps the chosen entries of the token axes of a value.

    Axis `batch` is that of the samples, or has size 1; `rank` puts axes of size 1 in front first.
    """

    keeps_axes = True

    def __init__(self, axes: tuple[int, ...], rank: int, batch: int = 0) -> None:
        super().__init__()
        self.axes, self.rank, self.batch = axes, rank, batch

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        while x.dim() < self.rank:
            x = x.unsqueeze(0)
        for axis in self.axes:
            ends = (self.batch, axis)
            x = _take(x.movedim(ends, (0, 1)), index).movedim((0, 1), ends)
        return x

    def extra_repr(self) -> str:
        return f"axes={self.axes}" + (f", batch={self.batch}" if self.batch else "")


class LiveKeys(nn.Module):
    """Hides the keys of slots that are not in use, on top of a mask or of the scores themselves.

    `mask [batch, heads, queries, keys]` (booleans: seen; floats: added), or None; `key` tells how
    many keys there are where there is no mask. Keys in front of the tokens' own stay seen.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, mask: Tensor | None, live: Tensor, key: Tensor | None = None) -> Tensor:
        count = mask.shape[-1] if mask is not None else key.shape[-2]  # pyright: ignore[reportOptionalMemberAccess]
        front = live.new_ones((live.shape[0], count - live.shape[1]))
        seen = torch.cat([front, live], 1)[:, None, None]
        if mask is None and self.causal:
            own = live.new_ones((live.shape[1], count)).tril(count - live.shape[1])
            return seen & own
        if mask is None or mask.dtype == torch.bool:
            return seen if mask is None else seen & mask
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    def extra_repr(self) -> str:
        return "causal" if self.causal else ""


class PutTokens(nn.Module):
    """`x + aside + scatter(weight * (after - before))`: the region's update at its tokens.

    Values by token are `[batch, tokens, width]`, or with `tokens_first` `[tokens, batch, width]`.
    """

    keeps_axes = True

    def __init__(self, tokens_first: bool = False) -> None:
        super().__init__()
        self.tokens_first = tokens_first

    def forward(
        self, x: Tensor, before: Tensor, after: Tensor, index: Tensor, weight: Tensor, aside: Tensor
    ) -> Tensor:
        if self.tokens_first:
            index, weight = index.mT, weight.mT
        update = (after - before) * weight.unsqueeze(-1)
        place = index.unsqueeze(-1).expand(-1, -1, update.shape[-1])
        return (x + aside).scatter_add(1 - self.tokens_first, place, update.to(x.dtype))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`x [batch or 1, tokens, ...]` at `index [batch, slots]`."""
    if _one(x.shape[0]):
        return x[0][index]
    return x[torch.arange(index.shape[0], device=index.device).unsqueeze(1), index]


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
