#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 (CPU).
# Guess: VB-LoRA saved with save_only_topk_weights=True computes after from_pretrained what it computed before.
# Seen: of k weights the file has k - 1, and the last is 1 minus their sum, of which the logarithm is taken. In float32 that sum can be
# above 1 where k is 3 or more and one logit is well above the others, as after training: the logarithm is NaN, and so are all outputs.
# Here one mixture of 1,536 is enough; of random ones with logits of deviation 8, 0.7 % do so at k = 3 and 18 % at k = 8.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy accelerate safetensors psutil pyyaml
env/bin/pip install -q --no-deps peft==0.21.2
HF_HUB_OFFLINE=1 env/bin/python -W ignore - <<'PY'
import copy

import torch
from peft import PeftModel, VBLoRAConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(512, 256))
config = VBLoRAConfig(
    r=16, target_modules=["0"], num_vectors=8, vector_length=8, topk=3, save_only_topk_weights=True
)
model = get_peft_model(copy.deepcopy(base), config)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "logits" in name:
            parameter.normal_(std=8.0)
x = torch.randn(4, 512)
before = model.eval()(x)
model.save_pretrained("adapter")
after = PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()(x)
print(f"before: {int(before.isnan().sum())} of {before.numel()} outputs are NaN; after: {int(after.isnan().sum())}")
if before.isnan().any() or not after.isnan().any():
    raise SystemExit("this has changed")
PY
