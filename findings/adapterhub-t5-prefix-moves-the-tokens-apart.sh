#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6 and torch 2.13.0 (CPU).
# Guess: prefix tuning puts rows in front of keys and values and leaves the tokens' relative positions as they are, as in BERT.
# Seen: in T5 the biases of relative positions are computed for keys that count the prefix and queries that do not: with a prefix of
# length 3, token i sees token j with the bias of distance j - i + 3 (itself as if 3 tokens ahead), and the rows have the biases of the
# first tokens. Rows that get no attention at all still change the model, so such a prefix cannot be used as plain keys and values.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q adapters==1.3.0 transformers==4.57.6
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import adapters
import torch
from transformers import T5Config, T5Model

torch.manual_seed(0)
config = T5Config(
    vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
)
model, tokens, length = T5Model(config).eval(), 5, 3
adapters.init(model)
attention = model.encoder.block[0].layer[0].SelfAttention
seen = []
attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
ids = torch.randint(1, 30, (1, tokens))
model.add_adapter("p", config=adapters.PrefixTuningConfig(flat=True, prefix_length=length))
with torch.no_grad():
    model(input_ids=ids, decoder_input_ids=ids)
    model.set_active_adapters("p")
    model(input_ids=ids, decoder_input_ids=ids)
plain, prefixed = seen
same = torch.equal(prefixed[..., length:], plain)
print(f"biases of {tokens} tokens without prefix {tuple(plain.shape)}, with one {tuple(prefixed.shape)}")
print("the tokens' biases are what they were:", same)
moved = all(
    torch.equal(prefixed[..., i, j + length], plain[..., i, j + length])
    for i in range(tokens)
    for j in range(tokens - length)
)
print(f"they are those of keys {length} further on:", moved)
print("the rows have those of the first tokens:", torch.equal(prefixed[..., :length], plain[..., :length]))
if same or not moved or not torch.equal(prefixed[..., :length], plain[..., :length]):
    raise SystemExit("this has changed")
PY
