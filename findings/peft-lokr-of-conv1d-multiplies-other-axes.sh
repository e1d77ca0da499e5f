#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 (CPU).
# Guess: LoKr on a Conv1d is the Kronecker product of its two factors over output and input channels, for every place of the kernel,
# as on a linear and on a Conv2d, and as LyCORIS has it.
# Seen: with a whole second factor `[out / a, in / b, kernel]` the first one meets input channels and places instead (torch.kron pads
# shapes in front), and the result is reshaped to the weight: no Kronecker product of channels. Conv2d is as guessed.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy accelerate safetensors psutil pyyaml
env/bin/pip install -q --no-deps peft==0.21.2
HF_HUB_OFFLINE=1 env/bin/python -W ignore - <<'PY'
import torch
from peft import LoKrConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
for cls, kernel in ((nn.Conv1d, (3,)), (nn.Conv2d, (3, 3))):
    net = nn.Sequential(cls(8, 12, kernel))
    config = LoKrConfig(r=8, alpha=8, target_modules=["0"], init_weights=False)
    layer = get_peft_model(net, config).base_model.model[0]
    one, two = layer.lokr_w1["default"].detach(), layer.lokr_w2["default"].detach()
    want = torch.kron(one[(..., *(None for _ in kernel))], two)
    got = layer.get_delta_weight("default").detach()
    off = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{cls.__name__}: {list(one.shape)} by {list(two.shape)}, off by {off:.2g} of the largest")
    if (off > 0.1) != (cls is nn.Conv1d):
        raise SystemExit("this has changed")
PY
