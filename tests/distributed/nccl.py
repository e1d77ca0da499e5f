"""One rank on a device, against the same program unsharded: `python -m tests.distributed.nccl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import peftfx
import peftfx.distributed as pd

from .. import models
from .job import base, gap, optimizer_of, prepared, task_loss


def step(module: nn.Module, optimizer: Any, device: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step, and complete gradients on the CPU."""
    loss = task_loss(module, {n: t.to(device) for n, t in models.batch(4).items()})
    loss.backward()
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), found


def check(folder: Path, device: str, on_device: bool, checkpoint: bool) -> dict[str, Any]:
    """Two steps beside the unsharded program, a checkpoint, and the third step from it."""
    captured = base()
    alone = prepared(captured).to(device)
    program = prepared(captured).to(device) if on_device else prepared(captured)
    module = pd.shard(peftfx.outline(program, checkpoint=checkpoint))
    optimizer, theirs = optimizer_of(module), optimizer_of(alone.module)
    ours, want = step(module, optimizer, device), step(alone.module, theirs, device)
    losses, expected = [ours[0]], [want[0]]
    losses.append(step(module, optimizer, device)[0])
    expected.append(step(alone.module, theirs, device)[0])
    path = pd.save_checkpoint(folder, peftfx.inline(module), optimizer, step=2)
    folded = peftfx.run(pd.gather(peftfx.inline(module)), "fold").export_state_dict()
    plain = peftfx.run(alone, "fold").export_state_dict()
    following = step(module, optimizer, device)[0]
    again = pd.shard(peftfx.outline(peftfx.run(captured, "lora{rank=4,where=q|v}").to(device)))
    fresh = optimizer_of(again)
    pd.load_checkpoint(path, peftfx.inline(again), fresh)
    held = list(module.parameters())
    return {
        "gradients": gap(want[1], ours[1]), "losses": losses, "alone": expected,
        "folded": gap({n: t.cpu() for n, t in plain.items()}, {n: t.cpu() for n, t in folded.items()}),
        "next": following, "resumed": step(again, fresh, device)[0],
        "devices": sorted({p.device.type for p in held}), "parameters": len(held),
        "sharded": sum(isinstance(p, DTensor) for p in held),
    }  # fmt: skip


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        cases = {"moved": (False, False), "there": (True, False), "checkpointed": (True, True)}
        print(json.dumps({n: check(folder / n, device, *case) for n, case in cases.items()}))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
