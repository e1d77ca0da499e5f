"""Runs the Triton kernels in Triton's interpreter on CPU tensors; prints the worst errors as JSON.

A program of its own, because TRITON_INTERPRET must be set before triton is first imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton

from peftfx.kernels.gpu import lora_linear as gpu


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def case(dtype: torch.dtype, m: int, n: int, k: int, r: int, bias: bool) -> dict[str, float]:
    torch.manual_seed(m)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    w = (torch.randn(n, k) / k**0.5).to(dtype)
    a, b = (torch.randn(r, k) / k**0.5).to(dtype), torch.randn(n, r).to(dtype)
    c = torch.randn(n).to(dtype) if bias else None
    y = gpu.forward(x, w, c, a, b, 0.5)
    dx, da, db = gpu.backward(dy, x, w, a, b, 0.5, True, True, True)
    X, Y, W, A, B = (t.double() for t in (x, dy, w, a, b))
    want = X @ W.T + 0.5 * (X @ A.T) @ B.T + (0 if c is None else c.double())
    dS = 0.5 * Y @ B
    if dx is None or da is None or db is None:
        raise RuntimeError("a requested gradient is missing")
    return {
        "y": relative(y, want),
        "dx": relative(dx, Y @ W + dS @ A),
        "da": relative(da, dS.T @ X),
        "db": relative(db, 0.5 * Y.T @ (X @ A.T)),
    }


def interpreter_works() -> bool:
    """False for triton before 3.9 with numpy from 2.4: loop bounds no longer convert to int."""
    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
    return not (old and tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4))


if __name__ == "__main__":
    if not interpreter_works():
        json.dump({}, sys.stdout)
        sys.exit()
    # Poison fresh memory: a result that is read but never written shows as NaN.
    empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = (  # type: ignore[method-assign]
        lambda self, *size, **options: empty(self, *size, **options).fill_(float("nan"))
    )
    errors = {
        f"{str(dtype)[6:]} {shape}": case(dtype, *shape)
        for dtype in (torch.float32, torch.float16)
        for shape in ((70, 90, 100, 8, True), (33, 65, 40, 16, False), (5, 64, 128, 20, True))
    }
    json.dump(errors, sys.stdout)
