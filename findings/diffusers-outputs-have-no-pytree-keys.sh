#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0 (CPU).
# Guess: what torch's pytree flattens, it also flattens with paths, so outputs can be named.
# Seen: diffusers registers its output classes for pytree without keys. tree_leaves gives the tensors of a UNet's output, and
# tree_leaves_with_path of the same object raises a ValueError. An ordinary dict with the same tensor gives both.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q diffusers==0.42.1 numpy
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.utils import _pytree as pytree


def outcome(tree):
    leaves = len(pytree.tree_leaves(tree))
    try:
        return leaves, len(pytree.tree_leaves_with_path(tree))
    except ValueError:
        return leaves, "ValueError"


sample = torch.zeros(1, 3, 8, 8)
seen = {"UNet2DOutput": outcome(UNet2DOutput(sample=sample)), "dict": outcome({"sample": sample})}
for name, (leaves, paths) in seen.items():
    print(f"{name}: tree_leaves gives {leaves}, tree_leaves_with_path gives {paths}")
if seen != {"UNet2DOutput": (1, "ValueError"), "dict": (1, 1)}:
    raise SystemExit("this has changed")
PY
