"""What operators of linears over stored formats have in common: slices of rows, and registration.

    y = x W^T + bias,   operator(x, *parts, bias, *numbers),   dense(*parts, *numbers, size) = W
    y = W[ids],         dense_rows(ids, *parts, *numbers, size, padding_idx, dtype)

Rows of W are made a slice at a time, in forward and again in backward, so no dense weight exists as
a whole and none is kept. Backward keeps x only if a part trains:

    dx = dy W,   dW = dy^T x (one slice of rows at a time),   dbias = sum dy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

SLICE = 1 << 20
"""Elements of the dense weight that exist at a time."""

_LIBRARY = library.Library("peftfx", "FRAGMENT")


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 `[..., bytes]` -> uint8 `[..., count]`, the first value in the lowest bits."""
    if bits == 8:
        return packed[..., :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count]


def digits(packed: Tensor, bits: int) -> Tensor:
    """`unpack` of all values in floating point: no exporter has shifts of bytes."""
    powers = 2.0 ** torch.arange(0, 8, bits, device=packed.device)
    return (torch.floor(packed.unsqueeze(-1) / powers) % (1 << bits)).flatten(-2)


@dataclass(frozen=True)
class StoredLinear:
    """A linear whose weight is stored in parts.

    Attributes:
        name: of the operator in `torch.ops.peftfx`.
        parts: names of the stored tensors; the first axis of each is that of rows.
        numbers: names of the integers that say how they are stored.
        dense: `(*parts, *numbers, size) -> W [rows, size]`, differentiable, in plain arithmetic.
        dense_name: of the operator that `dense` is registered as.
        rows: the same `(parts, numbers, size, dtype)`, as quick as can be.
        pull: `(dW, parts, numbers, needs)`, the gradients of the parts that need one; dW is
            `[rows, size]`.
        shared: parts without rows.
    """

    name: str
    parts: tuple[str, ...]
    numbers: tuple[str, ...]
    dense: Callable[..., Tensor]
    dense_name: str
    rows: Callable[[Sequence[Tensor], Sequence[int], int, torch.dtype], Tensor]
    pull: Callable[[Tensor, Sequence[Tensor], Sequence[int], Sequence[bool]], Sequence[Tensor]]
    shared: tuple[str, ...] = ()

    def register(self) -> Any:
        """Defines the operators; returns that of the linear, for graphs."""
        stored = ", ".join(f"Tensor {p}" for p in self.parts)
        numbers = ", ".join(f"int {n}" for n in self.numbers)
        back = f"{self.name}_backward"
        _LIBRARY.define(f"{self.name}(Tensor x, {stored}, Tensor? bias, {numbers}) -> Tensor")
        _LIBRARY.define(
            f"{back}(Tensor dy, Tensor x, {stored}, {numbers}, SymInt size, bool[] needs)"
            " -> Tensor[]"
        )
        _LIBRARY.define(f"{self.dense_name}({stored}, {numbers}, int size) -> Tensor")
        _LIBRARY.impl(self.dense_name, self.dense, "CompositeImplicitAutograd")
        _LIBRARY.define(
            f"{self.dense_name}_rows(Tensor ids, {stored}, {numbers}, int size, int? padding_idx, "
            "ScalarType dtype) -> Tensor"
        )
        _LIBRARY.impl(f"{self.dense_name}_rows", self._lookup, "CompositeImplicitAutograd")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._forward, key)
            _LIBRARY.impl(back, self._gradients, key)
            _LIBRARY.impl(self.name, self._autocast, f"Autocast{key}")
        library.register_fake(f"peftfx::{self.name}", self._forward_fake, lib=_LIBRARY)
        library.register_fake(f"peftfx::{back}", self._gradients_fake, lib=_LIBRARY)
        library.register_autograd(
            f"peftfx::{self.name}", self._backward, setup_context=self._setup, lib=_LIBRARY
        )
        return self.operator

    @property
    def operator(self) -> Any:
        """The operator of the linear."""
        return getattr(torch.ops.peftfx, self.name).default

    def _split(self, given: Sequence[Any]) -> tuple[list[Tensor], Tensor | None, list[int]]:
        count = len(self.parts)
        return list(given[:count]), given[count], list(given[count + 1 :])

    def _slices(self, parts: Sequence[Tensor], size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Slices of rows, and the parts of each."""
        step = max(1, SLICE // max(1, size))
        for start in range(0, parts[0].shape[0], step):
            rows = slice(start, start + step)
            named = zip(self.parts, parts, strict=True)
            yield rows, [p if n in self.shared else p[rows] for n, p in named]

    def _forward(self, x: Tensor, *given: Any) -> Tensor:
        parts, bias, numbers = self._split(given)
        size, out = x.shape[-1], parts[0].shape[0]
        down = x.reshape(-1, size)
        wide = _widest(parts, x.dtype)
        y = x.new_empty((down.shape[0], out))
        for rows, own in self._slices(parts, size):
            y[:, rows] = down @ self.rows(own, numbers, size, wide).to(x.dtype).t()
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*x.shape[:-1], out)

    def _gradients(self, dy: Tensor, x: Tensor, *given: Any) -> list[Tensor]:
        count = len(self.parts)
        parts, numbers = given[:count], given[count:-2]
        size, (need_x, *need, need_bias) = given[-2], given[-1]
        down = dy.reshape(-1, dy.shape[-1])
        wide = _widest(parts, dy.dtype)
        dx = dy.new_zeros((down.shape[0], size) if need_x else 0)
        gradients = [
            torch.zeros_like(p) if n else p.new_empty(0) for p, n in zip(parts, need, strict=True)
        ]
        read = x.reshape(-1, size) if any(need) else x
        for rows, own in self._slices(parts, size):
            if any(need):
                pulled = self.pull((down[:, rows].t() @ read).to(wide), own, numbers, need)
                each = zip(self.parts, gradients, pulled, need, strict=True)
                for name, whole, part, wanted in each:
                    if wanted:
                        (whole if name in self.shared else whole[rows]).add_(part)
            if need_x:
                dx.addmm_(down[:, rows], self.rows(own, numbers, size, wide).to(dy.dtype))
        dbias = down.sum(0) if need_bias else dy.new_empty(0)
        return [dx.view(*dy.shape[:-1], size) if need_x else dx, *gradients, dbias]

    def _lookup(self, ids: Tensor, *given: Any) -> Tensor:
        """`[*ids, size]` of rows that are gathered as they are stored; `padding_idx` is that of
        branches beside (none where ids may be negative, -1 for no such id)."""
        parts = zip(self.parts, given, strict=False)
        numbers, (size, _, dtype) = given[len(self.parts) : -3], given[-3:]
        flat = ids.reshape(-1)
        own = [part if name in self.shared else part[flat] for name, part in parts]
        return self.dense(*own, *numbers, size).to(dtype).reshape(*ids.shape, size)

    def _forward_fake(self, x: Tensor, *given: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], given[0].shape[0]))

    def _gradients_fake(self, dy: Tensor, x: Tensor, *given: Any) -> list[Tensor]:
        del x
        size, (need_x, *need, need_bias) = given[-2], given[-1]
        return [
            dy.new_empty((*dy.shape[:-1], size) if need_x else (0,)),
            *(p.new_empty(p.shape if n else (0,)) for p, n in zip(given, need, strict=False)),
            dy.new_empty((dy.shape[-1],) if need_bias else (0,)),
        ]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x = inputs[0]
        parts, bias, ctx.numbers = self._split(inputs[1:])
        trained = any(ctx.needs_input_grad[1 : 1 + len(parts)])
        ctx.save_for_backward(x if trained else parts[0], *parts)
        ctx.size, ctx.bias = x.shape[-1], None if bias is None else bias.dtype

    def _backward(self, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *parts = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = [*wanted[: 1 + len(parts)], wanted[1 + len(parts)] and ctx.bias is not None]
        operator = getattr(torch.ops.peftfx, f"{self.name}_backward")
        gradients = operator(dy, x, *parts, *ctx.numbers, ctx.size, needs)
        given = [g if n else None for g, n in zip(gradients, needs, strict=True)]
        if given[-1] is not None:
            given[-1] = given[-1].to(ctx.bias)
        return (*given, *(None for _ in self.numbers))

    def _autocast(self, x: Tensor, *given: Any) -> Tensor:
        device = x.device.type
        with torch.autocast(device, enabled=False):
            return self.operator(x.to(torch.get_autocast_dtype(device)), *given)


def _widest(parts: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """The dtype of a dense weight before it is rounded to that of x."""
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype) if part.is_floating_point() else dtype
    return dtype
