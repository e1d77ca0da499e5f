#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0, torch 2.13.0 (CPU).
# Guess: a GGUF file of architecture gpt2 that says gpt2.context_length = 32, with a position table of 32 rows, loads.
# Seen: the length goes into n_ctx, which no layer reads, and n_positions stays 1024: the table of 32 rows does not fit and loading
# raises. Any other length than 1024 fails (2048 as well). With n_positions set by hand the same file loads and computes what the
# model computed that it was written from.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 gguf==0.19.0 accelerate numpy
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, GPT2Config, GPT2LMHeadModel

seen = {}
for length in (32, 1024, 2048):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=1, n_positions=length, bos_token_id=0, eos_token_id=1)
    ).eval()
    writer = gguf.GGUFWriter(f"{length}.gguf", "gpt2")
    writer.add_context_length(length), writer.add_embedding_length(32), writer.add_block_count(1)
    writer.add_head_count(4), writer.add_feed_forward_length(128), writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2"), writer.add_token_list([f"<{i}>" for i in range(64)])
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 1)
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        turned = tensor.T if ".c_" in name and leaf == "weight" else tensor
        if name != "lm_head.weight":
            writer.add_tensor(f"{names.get_name(module)}.{leaf}", np.ascontiguousarray(turned.numpy()))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    config = AutoConfig.from_pretrained(".", gguf_file=f"{length}.gguf")
    seen[length] = [config.n_ctx, config.n_positions]
    for by_hand in (False, True):
        if by_hand:
            config.n_positions = length
        try:
            got = AutoModelForCausalLM.from_pretrained(
                ".", gguf_file=f"{length}.gguf", config=config, dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            ).eval()
        except RuntimeError:
            seen[length].append("refused")
            continue
        ids = torch.arange(20)[None]
        with torch.no_grad():
            gap = float((got(ids).logits - model(ids).logits).abs().max())
        seen[length].append("equal" if gap < 1e-5 else f"off by {gap}")
    print(f"context {length}: n_ctx, n_positions, as read, by hand: {seen[length]}")
if seen != {
    32: [32, 1024, "refused", "equal"], 1024: [1024, 1024, "equal", "equal"], 2048: [2048, 1024, "refused", "equal"],
}:
    raise SystemExit("this has changed")
PY
