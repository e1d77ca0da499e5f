"""The jobs, each run by two ranks; the tests beside assert on what they return."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftfx
import peftfx.distributed as pd
from peftfx.rewriter.distributed.ranks import exchange

from .. import models
from ..recipes import METHODS, start
from . import job
from .job import RECIPE, base, gap, gradients, optimizer_of, prepared, refusal, task_loss, train


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
        "accelerate": lambda p: Accelerator(cpu=True).prepare_model(p.module),
        "blocks": sharded,
        "root": lambda p: fully_shard(p.module),
    }
    for name, wrap in made.items():
        module: nn.Module = wrap(prepared(program))
        got = {n.removeprefix("module."): g for n, g in gradients(module).items()}
        optimizer = optimizer_of(module)
        curve = train(module, optimizer, 5)
        sharding = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
        rows = pd.held(module, optimizer, lambda m=module: task_loss(m, job.mine(models.batch(4))))
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
        given = program.spec.bind((), models.batch(job.ROWS))
        more = {n: t for n, t in given.items() if n not in models.batch(job.ROWS)}
        want = gradients(program.module, shared=False, **more)
        with warnings.catch_warnings(record=True) as said:
            found[name] = gap(want, gradients(sharded(program).eval(), **more)), len(said)
    return found


@job.job
def resume(folder: Path) -> Any:
    """Checkpoints of one and two processes, adapters and folding, of a sharded program."""
    captured, found = base(), dict[str, Any]()
    module = sharded(prepared(captured))
    optimizer = optimizer_of(module)
    train(module, optimizer, 3)
    with torch.no_grad():
        task_loss(module, models.batch(job.ROWS))  # leaves the root gathered
    program = peftfx.inline(module)
    pd.save_checkpoint(folder / "two", program, optimizer, step=3, extra={"note": "half way"})
    peftfx.save(program, folder / "adapter")
    found["folding"] = folding(program)
    found["two"] = train(module, optimizer, 2)
    for name in ("one", "two"):
        again = sharded(peftfx.run(captured, RECIPE))
        optimizer = optimizer_of(again)
        resumed = pd.load_checkpoint(
            pd.latest(folder / name) or "", peftfx.inline(again), optimizer
        )
        found[f"from {name}"] = [resumed.step, resumed.ranks, train(again, optimizer, 2)]
    found["thin"] = thin(folder)
    return found


def folding(program: peftfx.Program) -> dict[str, Any]:
    """Folding shards, against folding what is gathered."""
    folded = peftfx.run(program, "fold")
    state, want = folded.export_state_dict(), peftfx.run(pd.gather(program), "fold")
    sharding = [n for n, p in folded.module.named_parameters() if isinstance(p, DTensor)]
    return {
        "equal": all(torch.equal(t, state[n]) for n, t in want.export_state_dict().items()),
        "sharded": len(sharding), "parameters": len(list(folded.module.parameters())),
        "measured": folded.history[-1].certificate.measured, "tensors": len(state),
        "base": [program.identity, pd.held(program.base.module)[0].parameters],
    }  # fmt: skip


def thin(folder: Path) -> dict[str, Any]:
    """More ranks than blocks, and more than rows of a tensor."""
    captured = base(layers=1)
    program = prepared(captured, "lora{rank=1,where=q}")
    want = gradients(program.module, shared=False)
    module = sharded(program)
    got = gradients(module)
    optimizer = optimizer_of(module)
    train(module, optimizer, 1)
    pd.save_checkpoint(folder / "thin", peftfx.inline(module), optimizer, step=1)
    rows = [p.to_local().numel() for p in module.parameters() if p.requires_grad]
    return {
        "gradients": gap(want, got), "numbers": exchange(rows), "loss": train(module, optimizer, 1),
    }  # fmt: skip


@job.job
def refusals(folder: Path) -> Any:
    """What ranks must refuse, all of them and without waiting for each other."""
    captured, found, number = base(), dict[str, str](), pd.rank()
    uneven = prepared(captured, f"lora{{rank={number + 2},where=q|v}}")
    found["recipe"] = refusal(lambda: sharded(uneven))
    found["recipe, saving"] = refusal(lambda: peftfx.save(uneven, folder / "a", collective=True))
    other = models.randomise(peftfx.run(captured, RECIPE), seed=number)
    found["values"] = refusal(lambda: sharded(other))
    other.trainable_parameters()[0].data[0, 0] = float("nan") if number else 0.0
    found["one rank"] = refusal(lambda: peftfx.save(other, folder / "a", collective=True))
    module = sharded(prepared(captured))
    program = peftfx.inline(module)
    early, optimizer = optimizer_of(prepared(captured).module), optimizer_of(module)
    train(module, optimizer, 1)
    runs = folder / "runs"
    pd.save_checkpoint(runs, program, optimizer, step=1)
    found["twice"] = refusal(lambda: pd.shard(module))
    found["optimizer"] = refusal(lambda: pd.save_checkpoint(runs, program, early, step=2))
    found["step"] = refusal(lambda: pd.save_checkpoint(runs, program, optimizer, step=number))
    if not number:
        (runs / "step-00000003").write_text("in the way")
    found["file"] = refusal(lambda: pd.save_checkpoint(runs, program, optimizer, step=3))
    found["pass"] = refusal(lambda: peftfx.run(program, "ia3"))
    before = pd.gather(program).adapter_tensors("lora")
    for name, made in (
        ("other recipe", prepared(captured, "lora{rank=2,where=q}")),
        ("other base", prepared(base(seed=1))),
    ):
        again = sharded(made)
        inlined, fresh = peftfx.inline(again), optimizer_of(again)
        found[name] = refusal(
            lambda p=inlined, o=fresh: pd.load_checkpoint(runs / "step-00000001", p, o)
        )
    found["without"] = refusal(lambda: pd.load_checkpoint(runs / "step-00000001", program))
    after = pd.gather(program).adapter_tensors("lora")
    found["changed"] = str([n for n in before if not torch.equal(before[n], after[n])])
    found["latest"] = str(pd.latest(runs))
    return found


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@job.job
def crash(folder: Path) -> Any:
    """Rank 1 is killed while both write a checkpoint."""
    module = sharded(prepared(base()))
    program, optimizer = peftfx.inline(module), optimizer_of(module)
    train(module, optimizer, 1)
    pd.save_checkpoint(folder / "run", program, optimizer, step=1)
    train(module, optimizer, 1)
    if pd.rank():
        HuggingFaceStorageWriter.write_data = die
    return refusal(lambda: pd.save_checkpoint(folder / "run", program, optimizer, step=2))


if __name__ == "__main__":
    job.main()
