#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 (CPU).
# Guess: LoRA-GA's default scale="stable" begins as in the paper (arXiv:2407.05000, section 3.4): A = c V^T and B = c U of the
# gradient's singular vectors, c = out^1/4 / gamma^1/2, whatever the size of the loss.
# Seen: A = V^T alone, and B = c U S with the gradient's singular values. So the start is as large as the loss: one that is summed
# instead of averaged, or scaled for float16, begins that many times larger. Here c = 0.59: with the loss times 1e-3, 1 and 1e3 the first
# column of B has norm 2.9e-05, 0.029 and 29, and the weight that is left has moved by 1.4e-05, 0.014 and 14 of its norm.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy accelerate safetensors psutil pyyaml
env/bin/pip install -q --no-deps peft==0.21.2
HF_HUB_OFFLINE=1 env/bin/python -W ignore - <<'PY'
import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))
x, y = torch.randn(64, 24), torch.randn(64, 8)
norms = {}
for size in (1e-3, 1.0, 1e3):
    model = copy.deepcopy(base)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    preprocess_loraga(model, config, lambda: (size * (model(x) - y).pow(2).mean()).backward())
    s = torch.linalg.svdvals(model[0]._peft_loraga_grad)[4:8]
    layer = get_peft_model(model, config).base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    c = 32**0.25 / 16**0.5
    moved = (layer.base_layer.weight.detach() - base[0].weight.detach()).norm() / base[0].weight.detach().norm()
    norms[size] = float(b.norm())
    print(
        f"loss times {size:g}: rows of A have norm {a.norm(dim=1).mean():.3f} (paper {c:.3f}), columns of B "
        f"{[f'{v:.2g}' for v in b.norm(dim=0).tolist()]} (paper {c:.3f}; c S {[f'{v:.2g}' for v in (c * s).tolist()]}), "
        f"the base weight moved by {moved:.2g} of its norm"
    )
    if not torch.allclose(b.norm(dim=0), c * s, rtol=0.05) or abs(float(a.norm(dim=1).mean()) - 1) > 1e-3:
        raise SystemExit("this has changed")
if not (0.9e3 < norms[1.0] / norms[1e-3] < 1.1e3 and 0.9e3 < norms[1e3] / norms[1.0] < 1.1e3):
    raise SystemExit("this has changed")
PY
