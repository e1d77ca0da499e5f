#!/usr/bin/env bash
# onnxruntime 1.32.0 with onnx 1.23.2 and torch 2.13.0 (CPU).
# Guess: onnxruntime.quantization.quantize_dynamic takes any model that ONNX Runtime loads, so its result loads, too.
# Seen: from opset 23 on, torch.onnx.export writes the standard operator Attention. quantize_dynamic goes by the operator's name alone
# and turns it into com.microsoft.QAttention, as if it were the older contrib operator; loading the result is refused (is_causal is
# no attribute of that). With opset 20, or op_types_to_quantize=["MatMul"], the result loads.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy
env/bin/python - <<'PY'
import logging
import warnings

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def loads(path):
    try:
        onnxruntime.InferenceSession(path)
        return "loads"
    except Exception as error:
        return "is_causal refused" if "is_causal" in str(error) else f"refused: {error}"


seen = {}
for opset in (20, 24):
    model = torch.onnx.export(
        Attention().eval(), (torch.randn(2, 5, 16),), dynamo=True, opset_version=opset, verbose=False
    )
    model.save("m.onnx")
    quantize_dynamic("m.onnx", "all.onnx")
    quantize_dynamic("m.onnx", "matmul.onnx", op_types_to_quantize=["MatMul"])
    operators = {n.op_type for n in onnx.load("all.onnx").graph.node}
    seen[opset] = (loads("m.onnx"), "QAttention" in operators, loads("all.onnx"), loads("matmul.onnx"))
    print(f"opset {opset}: exported {seen[opset][0]}; quantised: QAttention {seen[opset][1]}, {seen[opset][2]}; MatMul only: {seen[opset][3]}")
if seen != {
    20: ("loads", False, "loads", "loads"),
    24: ("loads", True, "is_causal refused", "loads"),
}:
    raise SystemExit("this has changed")
PY
