#!/usr/bin/env bash
# torch 2.13.0 (CPU).
# Guess: what torch.nn.functional.grouped_mm computes eagerly, torch.export takes too, in the same dtypes; and its gradient does not depend
# on how the gradient that comes in is laid out.
# Seen: eagerly it runs in float32, float16 and bfloat16, torch.export takes bfloat16 alone ("Expected inputs of BF16 type"). In every dtype
# the backward of y.sum() raises ("Invalid strides/sizes"), because that gradient is one number expanded; that of (y * y).sum() works.
# So a model with experts by grouped_mm in float32 runs and does not export, and a loss that sums its output directly does not train.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q numpy
env/bin/python - <<'PY'
import logging

import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 8, dtype=dtype))

    def forward(self, x, ends):
        return nn.functional.grouped_mm(x, self.weight, offs=ends)


def outcome(work):
    try:
        work()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:32]
    return "runs"


logging.disable(logging.ERROR)
ends = torch.tensor([3, 7], dtype=torch.int32)
seen = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    model, x = Experts(dtype), torch.randn(7, 16, dtype=dtype)
    seen[str(dtype)[6:]] = [
        outcome(lambda: model(x, ends)),
        outcome(lambda: torch.export.export(model, (x, ends))),
        outcome(lambda: model(x, ends).sum().backward()),
        outcome(lambda: model(x, ends).square().sum().backward()),
    ]
for dtype, (eager, export, plain, square) in seen.items():
    print(f"{dtype}: eager {eager}; export {export}; backward of a sum {plain}; of squares {square}")
refused, strides = "Expected inputs of BF16 type but", "Invalid strides/sizes, got [0, 0]"[:32]
if seen != {
    "float32": ["runs", refused, strides, "runs"],
    "float16": ["runs", refused, strides, "runs"],
    "bfloat16": ["runs", "runs", strides, "runs"],
}:
    raise SystemExit("this has changed")
PY
