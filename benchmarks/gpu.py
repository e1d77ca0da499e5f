"""What `train.py --device cuda` has instead of the CPU's: models, clock and memory.

Weights are random and made on the device. Everything of a base is in its dtype but what trains:
that is float32 on our side and, by its default, on PEFT's, which computes in it, too; `peft 16-bit`
is PEFT with adapters in the base's dtype (`autocast_adapter_dtype=False`). TF32 is off.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import torch
from torch import Tensor, nn

DEVICE = "cuda"
VARIANTS = {
    "lowered": ";lower{target=triton}",
    "lowered (torch)": ";lower{target=cpu}",
}
"""Lowered forms of ours: with Triton kernels, with torch's own."""


@dataclass(frozen=True)
class DeviceBase(peers.Base):
    """A model on the device; `methods` are timed eager, `compiled` compiled, too."""

    dtype: torch.dtype = torch.float32
    methods: tuple[str, ...] = ("lora", "dora", "ia3", "serial_adapter", "prefix_tuning")
    compiled: tuple[str, ...] = ()

    @property
    def example(self) -> dict[str, Tensor]:
        """A small batch, which is captured faster."""
        return {n: t[:2, :64] for n, t in self.inputs.items()}


def placed(make: Callable[[int | None], nn.Module], dtype: torch.dtype, layers: int | None) -> Any:
    with torch.device(DEVICE):
        model = make(layers)
    for parameter in model.parameters():  # tables of rotary positions stay as they are
        parameter.data = parameter.data.to(dtype)
    return model.to(DEVICE)


def bert(layers: int | None) -> nn.Module:
    """A BERT of MiniLM's size without dropout."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(
        hidden_size=384, num_hidden_layers=layers or 6, num_attention_heads=12,
        intermediate_size=1536, vocab_size=30522, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def llama_1b(layers: int | None) -> nn.Module:
    """1.1 billion parameters, four key and value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers or 22,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=32000,
        tie_word_embeddings=False,
    ))  # fmt: skip


def base(
    like: peers.Base, make: Any, dtype: torch.dtype, rows: int, length: int, **options: Any
) -> DeviceBase:
    inputs = {
        n: t.to(DEVICE) for n, t in peers.tokens(rows, length, padded=not like.causal).items()
    }
    parts = {n: v for n, v in vars(like).items() if n not in ("make", "inputs")}
    return DeviceBase(partial(placed, make, dtype), inputs, **parts, dtype=dtype, **options)


def bases() -> dict[str, Any]:
    encoder, decoder = peers.BASES.values()
    low, few = torch.bfloat16, ("lora", "dora")
    return {
        "BERT of 23 M, float32, 64 x 128 tokens with padding": base(
            encoder, bert, torch.float32, 64, 128
        ),
        "Llama of 134 M, bfloat16, 8 x 512 tokens": base(
            decoder, peers.llama, low, 8, 512, compiled=("lora",)
        ),
        "Llama of 134 M, float32, 8 x 512 tokens": base(
            decoder, peers.llama, torch.float32, 8, 512, methods=few
        ),
        "Llama of 1.1 B, bfloat16, 4 x 1024 tokens": base(
            decoder, llama_1b, low, 4, 1024, methods=few
        ),
    }  # fmt: skip


def seconds(action: Callable[[], object]) -> float:
    """Wall time until the device is done."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak(step: Callable[[], float]) -> int:
    """Bytes that the allocator holds at most during a step, beyond what it held before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment() -> str:
    import triton

    return (
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {triton.__version__}, synchronised wall seconds"
    )
