#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0 (CPU).
# Guess: an attention_mask that has another batch size than input_ids is an error.
# Seen: BertModel takes a mask with more rows and leaves the last ones out without a word (sdpa and eager alike: the mask is read by
# row numbers of the batch); with fewer rows it raises IndexError. So a mask of another batch can be used by mistake.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 numpy
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import torch
from transformers import BertConfig, BertModel

seen = {}
for attention in ("sdpa", "eager"):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config._attn_implementation = attention
    model, ids = BertModel(config).eval(), torch.randint(1, 30, (3, 5))
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[:3, 3:] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask[:3]).last_hidden_state
        for rows in (4, 2):
            try:
                got = model(input_ids=ids, attention_mask=mask[:rows]).last_hidden_state
                seen[attention, rows] = "as with the first rows" if torch.equal(got, want) else "other"
            except IndexError:
                seen[attention, rows] = "IndexError"
            print(f"{attention}: 3 rows of ids, {rows} rows of mask: {seen[attention, rows]}")
if seen != {
    (attention, rows): what
    for attention in ("sdpa", "eager")
    for rows, what in ((4, "as with the first rows"), (2, "IndexError"))
}:
    raise SystemExit("this has changed")
PY
