#!/usr/bin/env bash
# lycoris-lora 4.1.3 with torch 2.13.0 (CPU).
# Guess: a LoHa or LoKr layer that is merged computes what it computed before.
# Seen: its forward adds `alpha / rank` times the product, get_diff_weight (which merge_to and get_merged_weight add) that scale twice: at
# alpha = rank / 2, merging halves the change. The file holds plain factors, and one application of the scale is what trained.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q numpy safetensors einops toml tqdm
env/bin/pip install -q --no-deps lycoris-lora==4.1.3
env/bin/python -W ignore - <<'PY'
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

torch.manual_seed(0)
for cls in (LohaModule, LokrModule):
    layer, x = nn.Linear(16, 24), torch.randn(5, 16)
    base = nn.functional.linear(x, layer.weight, layer.bias).detach()
    module = cls("name", layer, 1.0, 2, 1).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
        running = module(x) - base
        weight, _ = module.get_merged_weight()
        merged = nn.functional.linear(x, weight, layer.bias) - base
    share = (merged.norm() / running.norm()).item()
    print(f"{cls.__name__}: alpha / rank is {module.scale}, merged is {share:.3f} of what ran")
    if abs(share - module.scale) > 1e-3:
        raise SystemExit("this has changed")
PY
