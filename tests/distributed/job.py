"""Starting ranks, and what all their jobs share: `python -m tests.distributed.jobs FOLDER NAMES`.

Each job returns a JSON object, which the tests in the parent process assert on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
import peftfx.distributed as pd

from .. import models
from ..captures import captures

ROWS = 4
RECIPE = "lora{rank=4,where=q|v}"
JOBS: dict[str, Callable[[Path], Any]] = {}


def job(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    JOBS[function.__name__] = function
    return function


def launch(folder: Path, names: list[str], ranks: int = 2, timeout: int = 300) -> list[Any]:
    """Runs jobs, one after the other, in processes that meet through a file; their exits."""
    root = Path(__file__).parents[2]
    started: list[subprocess.Popen[str]] = []
    for number in range(ranks):
        env = os.environ | {
            "RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(number),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
            "MEETING": f"file://{folder}/meeting", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.distributed.jobs", str(folder), *names]
        started.append(subprocess.Popen(
            command, env=env, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ))  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, text) for p, text in zip(started, said, strict=True)]


def base(layers: int = 2, seed: int = 0) -> peftfx.Program:
    torch.manual_seed(seed)
    model = models.Decoder(layers=layers).eval()
    return peftfx.capture(model, kwargs=models.batch(ROWS), cache=captures())


def prepared(program: peftfx.Program, recipe: str = RECIPE) -> peftfx.Program:
    return models.randomise(peftfx.run(program, recipe))


def mine(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows."""
    count = ROWS // pd.world()
    return {n: t[pd.rank() * count :][:count] for n, t in batch.items()}


def task_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return loss_of(module(**batch), batch)


def loss_of(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits = models.first(outputs)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def optimizer_of(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, shared: bool = True
) -> list[float]:
    """The losses of the whole batch; with `shared` every rank has its rows of it."""
    batch = mine(models.batch(ROWS)) if shared else models.batch(ROWS)
    losses: list[float] = []
    for _ in range(steps):
        loss = task_loss(module, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss) if shared else loss.item())
    return losses


def mean(loss: Tensor) -> float:
    """Over all ranks."""
    total = loss.detach().clone()
    if pd.world() > 1:
        dist.all_reduce(total)
    return float(total) / pd.world()


def gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference relative to the largest value; the names have to be the same."""
    assert a.keys() == b.keys() and a
    worst = max(float((a[n] - b[n]).abs().max()) for n in a)
    return worst / max(float(t.abs().max()) for t in a.values())


def gradients(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete gradients of one backward, by parameter name."""
    task_loss(module, batch).backward()
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
            parameter.grad = None
    return found


def refusal(work: Callable[[], Any]) -> str:
    """The type and text of the error that something raises."""
    try:
        work()
    except peftfx.RewriteError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group(
        "gloo", init_method=os.environ["MEETING"], rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=120),
    )  # fmt: skip
    try:
        for name in names:
            result = JOBS[name](folder)
            (folder / f"{name}-{pd.rank()}.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()
