#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 (CPU).
# Guess: use_cayley_neumann only chooses how OFT's rotation is computed: its series approaches the exact rotation of the same numbers,
# and every further term brings it nearer.
# Seen: the series approaches the inverse of the exact rotation, so a file read with the other flag turns back; and three terms are
# the same as four, bit for bit.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy accelerate safetensors psutil pyyaml
env/bin/pip install -q --no-deps peft==0.21.2
HF_HUB_OFFLINE=1 env/bin/python -W ignore - <<'PY'
import torch
from peft.tuners.oft.layer import OFTRotationModule

torch.manual_seed(0)
module = OFTRotationModule(2, 6, 4, 8)
q = torch.randn(2, 6) * 0.02
exact = module._cayley_batch(q, 4, False)
series = {n: module._cayley_batch(q, 4, True, n) for n in (2, 3, 4, 5)}
same = (series[5] - exact).abs().max().item()
turned = (series[5] - exact.mT).abs().max().item()
equal = torch.equal(series[3], series[4])
print(f"off by {same:.2g} from the rotation, by {turned:.2g} from its inverse; 3 terms are 4: {equal}")
if not (same > 0.05 and turned < 1e-4 and equal and not torch.equal(series[4], series[5])):
    raise SystemExit("this has changed")
PY
