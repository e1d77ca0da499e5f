"""The jobs, each run by two ranks; the tests beside assert on what they return."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftfx
import peftfx.distributed as pd
from peftfx.rewriter.files.ranks import exchange

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
    want = gradients(alone.module, models.batch(job.ROWS))
    curve = train(alone.module, optimizer_of(alone.module), 5, shared=False)
    found: dict[str, Any] = {"alone": curve}
    made = {
        "ddp": lambda p: DistributedDataParallel(p.module),
        "accelerate": lambda p: Accelerator(cpu=True).prepare_model(p.module),
        "blocks": sharded,
        "checkpointed": lambda p: pd.shard(peftfx.outline(p, checkpoint=True)),
        "recomputed": lambda p: pd.shard(peftfx.outline(p, recompute=True)),
        "root": lambda p: fully_shard(p.module),
    }
    for name, wrap in made.items():
        module: nn.Module = wrap(prepared(program))
        got = {
            n.removeprefix("module."): g
            for n, g in gradients(module, job.mine(models.batch(job.ROWS))).items()
        }
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
    """Every method with its controllers, sharded by block, against one process."""
    captured, found = base(), dict[str, Any]()
    for name in METHODS:
        before, text = start(captured, name)
        alone = models.randomise(peftfx.run(before, text)).eval()
        module = sharded(alone.fork())
        parts = peftfx.inline(module)
        full = alone.spec.bind((), models.batch(job.ROWS))
        rows = {n: job.mine({n: t})[n] if t.dim() else t for n, t in full.items()}
        found[name] = {
            "gradients": gap(gradients(alone.module, full), gradients(module, rows)),
            "losses": [controlled(alone, alone.module, full), controlled(parts, module, rows)],
            "tensors": gap(trained(alone), trained(pd.gather(parts))),
            "whole": [
                n for n, p in module.named_parameters()
                if not isinstance(p, DTensor) and p.numel() > 1  # single numbers always are
            ],
        }  # fmt: skip
    return found


def controlled(program: peftfx.Program, module: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """Three steps with the controllers of the methods; the losses of the whole batch."""
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.SGD(controllers.param_groups(lr=0.1))
    controllers.start(optimizer, 3)
    losses: list[float] = []
    for step in range(3):
        controllers.begin_forward(batch)
        outputs = module(**batch)
        loss = job.loss_of(outputs, batch) + controllers.loss(outputs, batch, module)
        loss.backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
        losses.append(job.mean(loss) if module is not program.module else loss.item())
    return losses


def trained(program: peftfx.Program) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in program.named_trainable_parameters().items()}


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
    task_loss(module, job.mine(models.batch(job.ROWS))).backward()  # gradients are in no way
    found["folding"] = folding(program)
    optimizer.zero_grad()
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
    want = gradients(program.module, models.batch(job.ROWS))
    module = sharded(program)
    got = gradients(module, job.mine(models.batch(job.ROWS)))
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
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    outlined = peftfx.outline(prepared(captured))
    found["precision"] = refusal(lambda: pd.shard(outlined, mp_policy=low))
    found["meta"] = refusal(lambda: pd.shard(outlined.to("meta")))
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
        writer: Any = HuggingFaceStorageWriter
        writer.write_data = die
    return refusal(lambda: pd.save_checkpoint(folder / "run", program, optimizer, step=2))


if __name__ == "__main__":
    job.main()
