#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2 and onnx 1.23.2 (CPU).
# Guess: torch.onnx.export(dynamo=True, opset_version=N) writes opset N or raises.
# Seen: asked for 7 or 13 it writes 18 and raises nothing (a conversion that fails inside is dropped); 17, 18 and 20 are written as asked.
# So whoever ships to an older runtime has to look at model.opset_import.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q onnx==1.23.2 onnxscript==0.7.2 numpy
env/bin/python - <<'PY'
import logging
import warnings

import torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.ReLU()).eval()
written = {}
for asked in (7, 13, 17, 18, 20):
    program = torch.onnx.export(
        model, (torch.randn(2, 4),), dynamo=True, opset_version=asked, verbose=False
    )
    written[asked] = next(o.version for o in program.model_proto.opset_import if not o.domain)
    print(f"asked for opset {asked}: written {written[asked]}")
if written != {7: 18, 13: 18, 17: 17, 18: 18, 20: 20}:
    raise SystemExit("this has changed")
PY
