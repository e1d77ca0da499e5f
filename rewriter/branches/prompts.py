"""What is put in front of something: rows before keys and values, tokens before an input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .branch import Branch


class KeyValue(Branch):
    """Rows prepended to the keys and values of an attention."""

    slot = "key_value"
    by_query: ClassVar[bool] = False
    """Its read `gates`, `[batch, tokens, 1]`, scales what each query sees of the rows."""

    not_foldable = "extra keys and values take softmax mass, which no weight can express"

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def rows(self, *_: Any, **reads: Any) -> tuple[Tensor, Tensor]:
        """(keys, values) from what is read alone, each `[length, kv_heads, width]`, or with the
        batch in front."""
        raise NotImplementedError

    def forward(
        self, key: Tensor, value: Tensor, transposed: bool = False, **reads: Tensor
    ) -> tuple[Any, ...]:
        """Prepends the rows.

        Args:
            key: `[batch, heads, tokens, dim]`, or `[batch, heads, dim, tokens]` if `transposed`;
                the first two axes may be merged into one.
            value: `[batch, heads, tokens, dim]`, or merged.
        """
        k, v = self.rows(**reads)
        return self._join(k, key, transposed), self._join(v, value, False)

    def _join(self, rows: Tensor, x: Tensor, transposed: bool) -> Tensor:
        rows = rows.transpose(-2, -3)  # [..., kv_heads, length, width]
        heads = rows.shape[-3]
        if x.dim() == 4:
            if heads != x.shape[1]:
                rows = rows.repeat_interleave(x.shape[1] // heads, dim=-3)
            rows = rows.expand(x.shape[0], -1, -1, -1)
        elif rows.dim() == 4:
            rows = rows.flatten(0, 1)
        else:
            rows = rows.repeat(x.shape[0] // heads, 1, 1)
        rows = rows.mT if transposed else rows
        return torch.cat([rows.to(x.dtype), x], dim=-1 if transposed else -2)


class Tokens(Branch):
    """Vectors that take the place of `length` tokens prepended to the input."""

    slot = "tokens"
    reads = writes = "width"
    not_foldable = "prompt tokens are inputs of the network, not weights"
    chooses_sizes = True
    """It returns the shape of what it is given, which has more tokens than the prompt."""

    tokens_first: bool = False  # it is given [tokens, batch, width]
    place: str = "input"  # see `Editor.prepend_tokens`
    front: int = 0  # how many tokens of other prompts stand in front of its own

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def rows(self, *_: Any, **reads: Any) -> Tensor:
        """The vectors from what is read alone: `[length, width]`, or one prompt for each sample,
        `[batch, length, width]`."""
        raise NotImplementedError

    def forward(self, embedded: Tensor, **reads: Tensor) -> Tensor:
        """Overwrites `length` positions from `front` on of `embedded [batch, tokens, width]`, or
        with `tokens_first` of `[tokens, batch, width]`."""
        if self.tokens_first:
            embedded = embedded.transpose(0, 1)
        rows = self.rows(**reads).to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        before = [embedded[:, : self.front]] if self.front else []
        after = embedded[:, self.front + self.length :]
        prompted = torch.cat([*before, rows, after], dim=1)
        return prompted.transpose(0, 1) if self.tokens_first else prompted
