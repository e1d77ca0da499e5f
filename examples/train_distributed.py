"""Trains an adapter on one process, on all GPUs of a machine, or on several machines.

    python examples/train_distributed.py                                        # one process
    torchrun --standalone --nproc-per-node 8 examples/train_distributed.py      # one machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint first-machine:29500 --rdzv-id 1 examples/train_distributed.py   # on each
    accelerate launch --num_processes 8 examples/train_distributed.py           # or accelerate

`--engine ddp` keeps the whole model on every rank and averages gradients; `--engine shard` gives
every rank a part of each block (`fully_shard`), for models that are too large for one GPU.
`--folder` has to be on a file system that all machines see. If a job dies, start it again with the
same command, on as many ranks as there are now: it goes on from the last checkpoint. Without GPUs,
`torchrun` works as it is; accelerate starts several processes on CPUs with
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`.

Without `--model`, a small Llama with random weights learns to count.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx import distributed


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("ddp", "shard"), default="shard")
    parser.add_argument("--model", help="a Hugging Face model; default a small random Llama")
    parser.add_argument("--recipe", default="lora{rank=8,where=q|v}")
    parser.add_argument("--folder", default="run", help="checkpoints, and the adapter at the end")
    parser.add_argument("--rows", type=int, default=8, help="of a batch, over all ranks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    return parser.parse_args()


def build(name: str | None) -> Any:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)  # every rank has to build the same model
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(step: int, rows: int, device: torch.device) -> dict[str, Tensor]:
    """The batch of a step, the same on every rank."""
    starts = torch.randint(0, 64, (rows, 1), generator=torch.Generator().manual_seed(step))
    ids = (starts + torch.arange(16)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(module: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = module(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    if distributed.world() > 1:
        dist.all_reduce(total)
    return float(total) / distributed.world()


def train(options: argparse.Namespace, device: torch.device) -> None:
    if options.rows % distributed.world():
        raise SystemExit(f"--rows must be a multiple of the {distributed.world()} ranks.")

    model = build(options.model).eval().to(device)
    example = batch_of(0, options.rows, device)
    captured = peftfx.capture(model, kwargs=example, cache=True)  # restarts recall it
    program = peftfx.run(captured, options.recipe).train()
    module: Any = program.module
    if distributed.world() > 1 and options.engine == "ddp":
        module = DistributedDataParallel(module)
    elif distributed.world() > 1:
        module = distributed.shard(peftfx.outline(program))
        program = peftfx.inline(module)
        del model  # what it holds is whole

    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=1e-2, weight_decay=0.01))
    controllers.start(optimizer, options.steps)
    folder, begin = Path(options.folder), 0
    if (path := distributed.latest(folder)) is not None:
        begin = distributed.load_checkpoint(path, program, optimizer, controllers=controllers).step

    for step in range(begin, options.steps):
        batch = batch_of(step, options.rows, device)
        batch = {n: t[distributed.rank() :: distributed.world()] for n, t in batch.items()}
        controllers.begin_forward(batch)
        loss = loss_of(module, batch)
        (loss + controllers.loss(None, batch, module)).backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
        value = mean(loss)
        if distributed.rank() == 0:
            print(f"step {step + 1}: loss {value:.6f}", flush=True)
        if (step + 1) % options.every == 0:
            distributed.save_checkpoint(
                folder, program, optimizer, step=step + 1, controllers=controllers
            )

    for number, row in enumerate(distributed.held(module, optimizer)):
        if distributed.rank() == 0:
            print(f"rank {number} holds {row}")
    peftfx.save(program, folder / "adapter", collective=True)


def main() -> None:
    options = read_options()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    train(options, device)
    if dist.is_initialized():
        # Gloo's threads need Python to let go of tensors: they wait forever if the last owner of
        # the group is a DDP object, so none lives here, and abort if Python ends too early.
        dist.barrier()
        time.sleep(0.2)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
