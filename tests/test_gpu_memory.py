"""On a CUDA device: blocks, offloading, shards, and memory in bytes of torch's allocator."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx

from .models import Encoder, batch, first, randomise
from .test_gpu import DEVICE, EXACT, close, loss_of, pytestmark, there

__all__ = ["pytestmark"]

WIDTH, LAYERS = 1024, 8


def wide() -> peftfx.Program:
    """33 MB of frozen parameters in each of eight blocks; nothing else holds them."""
    torch.manual_seed(0)
    model = Encoder(WIDTH, 16, LAYERS).eval().requires_grad_(False).to(DEVICE)
    base = peftfx.capture(model, kwargs=there(batch()))
    return randomise(peftfx.run(base, "lora{rank=2,where=q|v}"))


def step_of(module: Any) -> Tensor:
    module.zero_grad()
    output = first(module(**there(batch(4, 11, pad=3))))
    loss_of(output).backward()
    return output.detach()


def run_blocks(**options: Any) -> tuple[int, int, Tensor, dict[str, Tensor]]:
    """Peak bytes of a step, bytes of a block, output and gradients."""
    program = wide()
    module = peftfx.outline(program, **options)
    del program
    gc.collect()  # graphs are cycles
    output = step_of(module)  # makes workspaces, which stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    output = step_of(module)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    frozen = [p for p in module.blocks[0].parameters() if not p.requires_grad]
    if options.get("offload"):
        assert all(p.device.type == "cpu" and p.is_pinned() for p in frozen)
        assert module.get_parameter("words.weight").device.type == DEVICE
    grads = {n: p.grad.cpu() for n, p in module.named_parameters() if p.grad is not None}
    return peak, sum(p.nbytes for p in frozen), output.cpu(), grads


@pytest.mark.parametrize("checkpoint", [False, True])
def test_offload(checkpoint: bool) -> None:
    """What a step holds is less by all blocks but what two hold: copies live while their operator
    runs, or while the backward pass of their checkpointed block does; one for rounding."""
    plain, block, want, theirs = run_blocks(checkpoint=checkpoint)
    less, _, got, ours = run_blocks(checkpoint=checkpoint, offload=True)
    assert block > 30e6
    assert (LAYERS - 2) * block <= plain - less <= (LAYERS + 0.5) * block, (plain, less, block)
    close(got, want, 1e-5)
    close(ours, theirs, 1e-4)  # attention's backward adds in any order


def test_offload_before_moving() -> None:
    """What is offloaded on the CPU never gets to the device, in the program as captured neither."""
    torch.manual_seed(0)
    model = Encoder(WIDTH, 16, LAYERS).eval().requires_grad_(False)
    program = peftfx.run(peftfx.capture(model, kwargs=batch()), "lora{rank=2,where=q|v}")
    want = first(model(**batch()))
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module = peftfx.outline(program, offload=True).to(DEVICE)
    block = sum(p.nbytes for p in module.blocks[0].parameters())
    assert torch.cuda.max_memory_allocated() - before < block
    with torch.no_grad():
        close(first(module(**there(batch()))), want)


@pytest.mark.parametrize("which", [True, "budget"])
def test_checkpoint(captured: Any, which: Any) -> None:
    program = randomise(peftfx.run(captured["encoder"][1], "lora{rank=2}")).to(DEVICE).train()
    inputs = there(batch(4, 11, pad=3))
    free = peftfx.outline(program).report(inputs).without
    chosen = True if which is True else free - 1
    module = peftfx.outline(program, checkpoint=chosen, inputs=inputs)
    assert [b.checkpointed for b in module.blocks].count(True) == (2 if which is True else 1)
    results: list[dict[str, Tensor]] = []
    for one in (program.module, module):
        torch.manual_seed(0)  # dropout is drawn again alike
        one.zero_grad()
        loss_of(first(one(**inputs))).backward()
        held = one.named_parameters()
        results.append({n: p.grad.clone() for n, p in held if p.grad is not None})
    close(results[1], results[0], 1e-4)


# Memory.


def requested() -> int:
    """Bytes that are allocated, without the allocator's rounding."""
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype) -> None:
    """A Llama of 134 M parameters, two rows of 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model = model.to(DEVICE, dtype).requires_grad_(False)
    ids = torch.randint(5, 30000, (2, 512), device=DEVICE)
    base = peftfx.capture(model, kwargs={"input_ids": ids[:, :64]})
    program = peftfx.run(base, "causal{length=512};lora{rank=8,where=q|v}").train()
    found = program.memory(2, 512)
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-4, foreach=True)

    def forward() -> Tensor:
        return first(program(input_ids=ids)).sum()

    forward().backward()  # makes workspaces, which stay
    with_gradients = requested()
    optimizer.zero_grad()
    nothing = requested()
    assert with_gradients - nothing == found.gradients
    loss = forward()
    saved = requested() - nothing - loss.nbytes
    assert saved == pytest.approx(found.saved, rel=0.05), (saved, found.saved)
    loss.backward()
    del loss
    optimizer.step()
    assert requested() - nothing == found.gradients + found.optimizer
    held = {t.untyped_storage().data_ptr(): t.nbytes
            for t in (*program.module.parameters(), *program.module.buffers())}  # fmt: skip
    assert sum(held.values()) == found.parameters


# Shards.


def test_sharded(tmp_path: Path) -> None:
    """One rank with NCCL, in a process of its own, against the program unsharded."""
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.nccl", str(tmp_path), DEVICE]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"moved", "there", "checkpointed"}
    for name, got in found.items():
        assert got["devices"] == [DEVICE] and got["sharded"] == got["parameters"], name
        assert got["gradients"] < EXACT and got["folded"] < EXACT, name
        assert got["losses"] == pytest.approx(got["alone"], rel=1e-5), name
        assert got["resumed"] == pytest.approx(got["next"], rel=1e-6), name
