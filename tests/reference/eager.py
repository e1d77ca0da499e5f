"""Independent references of the six methods, written from their equations on the hand-written
models with forward hooks. Imports nothing of peftfx.

A reference takes the plain model and the method's tensors by site name (`layers.0.query`, ...)
and returns the model's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = Mapping[str, Mapping[str, Tensor]]


@contextlib.contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Generator[None]:
    """Forward hooks on modules by name: hook(inputs, output) -> output."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, i, o, f=f: f(i, o))
        for name, f in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lora(model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor], scale: float) -> Any:
    """y = W x + b + s B (A x)."""

    def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda i, o: o + scale * (i[0] @ a.T) @ b.T

    with hooked(model, {n: hook(t["a"], t["b"]) for n, t in tensors.items()}):
        return model(**inputs)


def ia3(model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor]) -> Any:
    """k, v <- l * k, l * v; W_down (l * h)."""

    def hook(linear: nn.Linear, vector: Tensor) -> Callable[..., Tensor]:
        if vector.numel() == linear.in_features and linear.in_features != linear.out_features:
            return lambda i, o: F.linear(i[0] * vector, linear.weight, linear.bias)
        return lambda i, o: o * vector

    hooks: dict[str, Callable[..., Tensor]] = {}
    for name, t in tensors.items():
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            hooks[name] = hook(linear, t["l"])
    with hooked(model, hooks):
        return model(**inputs)


def serial_adapter(model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor]) -> Any:
    """h <- h + U gelu(D h + b_D) + b_U on the output of a sublayer's last linear (no dropout)."""

    def hook(t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def adapt(_: Any, h: Tensor) -> Tensor:
            return h + F.gelu(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

        return adapt

    with hooked(model, {n: hook(t) for n, t in tensors.items()}):
        return model(**inputs)


@contextlib.contextmanager
def _attention(rows: list[tuple[Tensor, Tensor]]) -> Generator[None]:
    """Replaces fused attention by the explicit formula with rows before keys and values."""
    real = F.scaled_dot_product_attention
    turn = iter(rows)

    def explicit(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0, **_: Any
    ) -> Tensor:
        pk, pv = next(turn)
        b, h = k.shape[:2]

        def shape(r: Tensor) -> Tensor:
            heads = r.transpose(0, 1).repeat_interleave(h // r.shape[1], 0)
            return heads[None].expand(b, -1, -1, -1)

        k, v = torch.cat([shape(pk), k], 2), torch.cat([shape(pv), v], 2)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            seen = torch.ones(*mask.shape[:-1], pk.shape[0], dtype=torch.bool)
            scores = scores.masked_fill(~torch.cat([seen, mask], -1), float("-inf"))
        return scores.softmax(-1) @ v

    F.scaled_dot_product_attention = explicit  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def prefix_tuning(
    model: nn.Module, rows: list[tuple[Tensor, Tensor]], inputs: Mapping[str, Tensor]
) -> Any:
    """K <- [P_k; K], V <- [P_v; V], every layer; rows [length, kv_heads, dim] in layer order."""
    with _attention(rows):
        return model(**inputs)


def prompt_tuning(
    model: nn.Module, embedding: str, prompt: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """X <- [P; E(x)], longer mask, positions 0.., outputs without the prompt."""
    length = prompt.shape[0]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longer = torch.cat([torch.zeros_like(ids[:, :1]).expand(-1, length), ids], 1)
    seen = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, length), mask], 1)

    def put(_: Any, e: Tensor) -> Tensor:
        return torch.cat([prompt.expand(e.shape[0], -1, -1), e[:, length:]], 1)

    with hooked(model, {embedding: put}):
        output = model(input_ids=longer, attention_mask=seen)
    return (output[0] if isinstance(output, tuple) else output)[:, length:]


def bitfit(model: nn.Module, biases: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """The model with other biases; a linear without one gets `+ b`."""
    hooks: dict[str, Callable[..., Tensor]] = {}
    saved: dict[str, Tensor] = {}
    held = dict(model.named_parameters())
    for name, bias in biases.items():
        if name in held:
            saved[name] = held[name].detach().clone()
            held[name].data.copy_(bias)
        else:
            hooks[name.removesuffix(".bias")] = lambda i, o, b=bias: o + b
    try:
        with hooked(model, hooks):
            return model(**inputs)
    finally:
        for name, bias in saved.items():
            held[name].data.copy_(bias)
