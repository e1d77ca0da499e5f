#!/usr/bin/env bash
# peft 0.21.2 and 0.18.1 with torch 2.13.0 (CPU).
# Guess: LoRA on nn.MultiheadAttention adds scaling * B A to the input and to the output projection.
# Seen: to the input projection once, to the output projection twice, in eval and train mode and in what merge_and_unload leaves. The
# file holds the plain factors, so a reader that adds B A once is off by as much as the adapter does there.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy accelerate safetensors psutil pyyaml
for version in 0.21.2 0.18.1; do
  env/bin/pip install -q --no-deps peft==$version
  HF_HUB_OFFLINE=1 env/bin/python -W ignore - "$version" <<'PY'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


torch.manual_seed(0)
base, x = Net().eval(), torch.randn(2, 5, 16)
model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=["attn"]))
with torch.no_grad():
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(torch.randn_like(p) * 0.3)
p = {n: t.detach() for n, t in model.named_parameters()}
inner = "base_model.model.attn.{}lora_{}.default.weight"
change_in = 2 * p[inner.format("", "B")] @ p[inner.format("", "A")]
change_out = 2 * p[inner.format("base_layer.out_proj.", "B")] @ p[inner.format("base_layer.out_proj.", "A")]


def reference(times):
    net = copy.deepcopy(base)
    with torch.no_grad():
        net.attn.in_proj_weight += change_in
        net.attn.out_proj.weight += times * change_out
    return net(x)


got = {"eval": model.eval()(x), "train": model.train()(x)}
got["merged"] = model.eval().merge_and_unload()(x)
for mode, y in got.items():
    gaps = [(y - reference(times)).abs().max().item() for times in (1, 2)]
    print(f"peft {sys.argv[1]}, {mode}: off by {gaps[0]:.2g} from once, by {gaps[1]:.2g} from twice")
    if not (gaps[0] > 0.1 and gaps[1] < 1e-5):
        raise SystemExit("this has changed")
PY
done
