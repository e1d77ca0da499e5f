#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0 and torch 2.13.0 (CPU).
# Guess: create_lorafa_optimizer trains a float32 model in float32.
# Seen: it multiplies the gradient of B by (A A^T)^-1 / s^2 under autocast to bfloat16 wherever accelerate says that the machine has
# bfloat16 (a CPU always), whatever the model's dtype: what Adam averages has 8 bits of mantissa and is 3e-3 off.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q peft==0.21.2 transformers==5.23.0
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

torch.manual_seed(0)
model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)
model(torch.randn(32, 64)).square().mean().backward()
layer = model.base_model.model[0]
a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
exact = b.grad.double() @ torch.linalg.inv(a.double() @ a.double().T)
optimizer.step()
(state,) = optimizer.state.values()
used = state["exp_avg_B"] / 0.1  # the first step's moment is a tenth of what the optimizer saw
error = float((used - exact).norm() / exact.norm())
rounded = float((used - used.bfloat16().float()).abs().max() / used.abs().max())
print(f"parameters: {b.dtype}; the gradient that is averaged is off by {error:.1e}, and {rounded:.0e} from being bfloat16")
if not (b.dtype == torch.float32 and error > 5e-4 and rounded < 1e-6):
    raise SystemExit("this has changed")
PY
