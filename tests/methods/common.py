"""What the tests of all methods use. The references in those tests are written from the equations
with forward hooks on the plain model; nothing of a reference comes from peftfx."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx

from ..models import batch, first, moved

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


def tensors(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """Branch tensors by module name: {"layers.0.query": {"a": ..., "b": ...}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for attachment in program.attachments:
        module = program.branch(attachment)
        site = attachment.site.removesuffix(".weight")
        found[site] = {n: p.detach() for n, p in module.named_parameters()}
    return found


def check(program: peftfx.Program, base: peftfx.Program, want: Any, inputs: Any) -> None:
    got = first(program(**inputs))
    torch.testing.assert_close(got, first(want), rtol=1e-5, atol=1e-5)
    assert moved(first(base(**inputs)), got) > 0.01


def copied(program: peftfx.Program, model: Any, pairs: dict[str, str]) -> None:
    """Copies our branch tensors into PEFT's parameters: our suffix -> theirs."""
    theirs = dict(model.named_parameters())
    count = 0
    with torch.no_grad():
        for name, parameter in program.named_trainable_parameters().items():
            _, _, rest = name.split(".", 2)
            path, _, leaf = rest.rpartition(".")
            path = path.rpartition(".")[0]
            target = f"base_model.model.{path}.{pairs[leaf]}"
            theirs[target].copy_(parameter.view(theirs[target].shape))
            count += 1
    assert count


@contextlib.contextmanager
def attention_with_rows(rows: list[tuple[Tensor, Tensor]]) -> Generator[None]:
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


def digits(count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Real scanned digits as 16 tokens (the means of 2 x 2 pixels): (inputs, numbers 0 to 9)."""
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    pixels = torch.tensor(images[:count]).view(-1, 4, 2, 4, 2).mean((2, 4)).round().long()
    ids = pixels.flatten(1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor(numbers[:count])


def readout(hidden: Tensor) -> Tensor:
    """Logits of two classes from all tokens' features, by a fixed random matrix."""
    flat = hidden.flatten(1)
    generator = torch.Generator().manual_seed(0)
    return flat @ torch.randn(flat.shape[1], 2, generator=generator) / flat.shape[1] ** 0.5


LAST: dict[str, dict[str, dict[str, str]]] = {
    "encoder": {"s0": {"attn": "layers.{}.dense", "ffn": "layers.{}.fc2"}},
    "decoder": {"s0": {"attn": "layers.{}.o_proj", "ffn": "layers.{}.down"}},
    "t5": {
        "s0": {
            "attn": "encoder.block.{}.layer.0.SelfAttention.o",
            "ffn": "encoder.block.{}.layer.1.DenseReluDense.wo",
        },
        "s1": {
            "attn": "decoder.block.{}.layer.0.SelfAttention.o",
            "cross": "decoder.block.{}.layer.1.EncDecAttention.o",
            "ffn": "decoder.block.{}.layer.2.DenseReluDense.wo",
        },
    },
}
"""The last linear of each sublayer, by stream: where a hook sees what a serial adapter reads."""


def subject(captured: Any, zoo: Any, name: str) -> tuple[Any, peftfx.Program, dict[str, Tensor]]:
    if name == "t5":
        ids = batch(4, 11, seed=1)["input_ids"] % 60
        return zoo.model("t5"), zoo["t5"], {**batch(4, 9, pad=3), "decoder_input_ids": ids}
    return *captured[name], batch(4, 11, pad=3)
