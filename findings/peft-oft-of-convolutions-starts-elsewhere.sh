#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 (CPU).
# Guess: an OFT adapter that was just made leaves a model what it was, on a convolution as on a linear, and computes what
# merge_and_unload leaves.
# Seen: on a convolution of kernel 3 the output is another one: patches are cut out, turned, and added up again where they overlap, so
# an inner pixel counts up to nine times. Merged, the fresh adapter is the base, bit for bit. Kernel 1 is as guessed.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy accelerate safetensors psutil pyyaml
env/bin/pip install -q --no-deps peft==0.21.2
HF_HUB_OFFLINE=1 env/bin/python -W ignore - <<'PY'
import copy

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
for kernel in (1, 3):
    net, x = nn.Sequential(nn.Conv2d(4, 8, kernel)).eval(), torch.randn(2, 4, 6, 6)
    config = OFTConfig(target_modules=["0"], oft_block_size=4)
    model = get_peft_model(copy.deepcopy(net), config).eval()
    with torch.no_grad():
        fresh = (model(x) - net(x)).abs().max().item()
        merged = (model.merge_and_unload()(x) - net(x)).abs().max().item()
    print(f"kernel {kernel}: a fresh adapter moves outputs by {fresh:.2g}, merged by {merged:.2g}")
    if merged != 0 or (fresh > 0.1) != (kernel == 3):
        raise SystemExit("this has changed")
PY
