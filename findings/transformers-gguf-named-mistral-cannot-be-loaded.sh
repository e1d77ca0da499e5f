#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0, torch 2.13.0 (CPU).
# Guess: general.name, a free text, has no influence on how a GGUF file of architecture llama is read.
# Seen: if the name is exactly "mistral", the configuration is that of another class, with an attention window of 4096 tokens that the
# file does not have, and the model cannot be loaded (the package gguf knows no architecture of that name). Any other name, "Mistral 7B"
# too, is read as Llama and loads. The two files differ in nothing else.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q transformers==5.23.0 gguf==0.19.0 accelerate numpy
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
)
seen = {}
for name in ("mistral", "Mistral 7B"):
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_name(name)
    writer.add_context_length(128), writer.add_embedding_length(32), writer.add_block_count(1)
    writer.add_head_count(4), writer.add_head_count_kv(4), writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-6), writer.add_rope_dimension_count(8), writer.add_vocab_size(64)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", tensor.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    config = AutoConfig.from_pretrained(".", gguf_file="model.gguf")
    try:
        loaded = type(AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf")).__name__
    except NotImplementedError as error:
        loaded = str(error)[:34]
    seen[name] = (config.model_type, getattr(config, "sliding_window", None), loaded)
    print(f"{name}: {seen[name]}")
if seen != {
    "mistral": ("mistral", 4096, "Unknown gguf model_type: mistral i"),
    "Mistral 7B": ("llama", None, "LlamaForCausalLM"),
}:
    raise SystemExit("this has changed")
PY
