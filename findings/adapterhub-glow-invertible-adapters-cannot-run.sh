#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6 and torch 2.13.0 (CPU).
# Guess: both kinds of invertible adapters that its configurations name, "nice" and "glow", run on any model.
# Seen: "nice" runs; "glow" can be added to a model and saved, but the first forward raises a RuntimeError, at the default reduction and
# at 1, 2 and 4: the half of the features that its networks return does not fit what is computed with it. No such adapter can have been
# trained with this version.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q adapters==1.3.0 transformers==4.57.6
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import adapters
import torch
from transformers import BertConfig, BertModel

config = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
)
model = BertModel(config).eval()
adapters.init(model)
ids = torch.arange(6)[None]


def runs(kind, **options):
    name = f"{kind}_{options.get('inv_adapter_reduction_factor', 'default')}"
    model.add_adapter(name, config=adapters.SeqBnInvConfig(inv_adapter=kind, **options))
    model.set_active_adapters(name)
    try:
        with torch.no_grad():
            shape = tuple(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape)
    except RuntimeError as error:
        print(f"{name}: RuntimeError: {error}")
        return False
    print(f"{name}: {shape}")
    return True


options = [{}] + [{"inv_adapter_reduction_factor": factor} for factor in (1, 2, 4)]
nice = [runs("nice", **o) for o in options]
glow = [runs("glow", **o) for o in options]
if not all(nice) or any(glow):
    raise SystemExit("this has changed")
PY
