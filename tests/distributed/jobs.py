"""The jobs, each run by two ranks; the tests beside assert on what they return."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftfx
import peftfx.distributed as pd
from peftfx.rewriter.running.passes import REGISTRY

from .. import models
from ..recipes import METHODS, start
from . import job
from .job import RECIPE, base, gap, gradients, optimizer_of, prepared, refusal, train


def sharded(program: peftfx.Program) -> Any:
    return pd.shard(peftfx.outline(program))


@job.job
def engines(folder: Path) -> Any:
    """DDP, and `fully_shard` by block and as one, against one process."""
    program = base()
    alone = prepared(program)
    want = gradients(alone.module, shared=False)
    curve = train(alone.module, optimizer_of(alone.module), 5, shared=False)
    found: dict[str, Any] = {"alone": curve}
    made = {
        "ddp": lambda p: DistributedDataParallel(p.module),
        "blocks": sharded,
        "root": lambda p: torch.distributed.fsdp.fully_shard(p.module),
    }
    for name, wrap in made.items():
        module: nn.Module = wrap(prepared(program))
        got = {n.removeprefix("module."): g for n, g in gradients(module).items()}
        optimizer = optimizer_of(module)
        curve = train(module, optimizer, 5)
        sharding = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
        rows = pd.held(
            module, optimizer, lambda m=module: job.task_loss(m, job.mine(models.batch(4)))
        )
        found[name] = {
            "gradients": gap(want, got), "curve": curve, "sharded": len(sharding),
            "parameters": len(list(module.parameters())), "held": [vars(r) for r in rows],
        }  # fmt: skip
    return found


@job.job
def methods(folder: Path) -> Any:
    """Every method, sharded by block: gradients of one process."""
    found: dict[str, Any] = {}
    captured = base()
    for name in METHODS:
        before, text = start(captured, name)
        program = models.randomise(peftfx.run(before, text))
        program.eval()
        want = gradients(program.module, shared=False)
        found[name] = gap(
            want, gradients(torch.distributed.fsdp.fully_shard(program.module).eval())
        )
    return found


if __name__ == "__main__":
    job.main()
