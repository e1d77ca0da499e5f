"""What SAID costs, and where its curve has its knee: `python -m benchmarks.said`.

MiniLM (22 M parameters), all of its tensors; one thread, CPU seconds, interleaved in rotated order,
medians. `project` makes `P theta` of every tensor from the seed, `adjoint` takes a gradient of
every tensor back to theta, `copy` clones every tensor. The curve is that of Li et al. (ICLR 2018,
arXiv:1804.08838): n equations for 960 weights have an intrinsic dimension of n; what is left of the
right-hand side at the best theta, for d around n. Writes `benchmarks/said.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import peftfx
from benchmarks.core import cpu, interleaved, summary
from peftfx.demo.encoder import load_model
from peftfx.kernels.random_projection import random_projection


def projections(dimension: int, rounds: int) -> dict[str, Any]:
    """CPU seconds for the whole model."""
    tensors = [p.detach() for p in load_model().parameters()]
    theta = torch.randn(dimension)
    adjoint = torch.ops.peftfx.random_projection_adjoint

    def project() -> object:
        return [random_projection(theta, 0, i, t.numel()) for i, t in enumerate(tensors)]

    def back() -> object:
        return [adjoint(t.flatten(), 0, i, dimension, False) for i, t in enumerate(tensors)]

    def copy() -> object:
        return [t.clone() for t in tensors]

    actions = {"copy": copy, "project": project, "adjoint": back}
    times = interleaved({n: (lambda a=a: cpu(a)) for n, a in actions.items()}, rounds)
    return {"entries": sum(t.numel() for t in tensors)} | summary(times, "copy")


def artifact(dimension: int) -> dict[str, int]:
    """Bytes of a saved adapter of the whole model."""
    ids = torch.arange(14).view(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = peftfx.run(
        peftfx.capture(load_model(), kwargs=inputs), f"said{{dimension={dimension}}}"
    )
    with tempfile.TemporaryDirectory() as folder:
        peftfx.save(program, Path(folder) / "a")
        files = {f.name: f.stat().st_size for f in (Path(folder) / "a").iterdir()}
    return {n: files[n] for n in ("manifest.json", "tensors.safetensors")}


def knee(equations: int) -> dict[int, float]:
    """d -> the share of the right-hand side that the best theta leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(960, 1, bias=False))
    x, y = torch.randn(equations, 960), torch.randn(equations, 1)
    base = peftfx.capture(model, (x,))
    left: dict[int, float] = {}
    for d in (equations // 2, equations - 1, equations, equations + 1, 2 * equations):
        options = f"dimension={d},structure_aware=false,where=linear"
        program = peftfx.run(base, f"said{{{options}}}")
        (theta,) = program.trainable_parameters()
        rows = [torch.autograd.grad(program(x)[i, 0], theta)[0] for i in range(equations)]
        a, b = torch.stack(rows).double(), (y - model(x)).detach().double()
        best = torch.linalg.lstsq(a, b, driver="gelsd").solution
        left[d] = float(f"{float((a @ best - b).norm() / b.norm()):.2g}")
    return left


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("said.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "projection [CPU s]": {d: projections(d, options.rounds) for d in (1000, 20000)},
        "artifact [bytes]": {d: artifact(d) for d in (1000, 20000)},
        "left of the right-hand side, by d": {n: knee(n) for n in (10, 40)},
    }
    text = json.dumps(found, indent=1)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
