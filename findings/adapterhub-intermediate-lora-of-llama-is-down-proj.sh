#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6 and torch 2.13.0 (CPU).
# Guess: LoRAConfig(intermediate_lora=True) adapts what leads into the feed-forward's inner layer (up_proj), output_lora=True what leads
# out of it (down_proj), as in BERT (intermediate.dense, output.dense) and as (IA)3 needs it.
# Seen: in Llama and Mistral it is the other way round: intermediate_lora adapts down_proj, output_lora up_proj. IA3Config(), which says
# intermediate_lora, so scales the block's output there, and its inner layer in BERT, GPT-2 and T5. Only a file's keys tell what it adapts.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q adapters==1.3.0 transformers==4.57.6
HF_HUB_OFFLINE=1 env/bin/python - <<'PY'
import adapters
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig, MistralConfig, T5Config

small = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}
configs = {
    "Bert": BertConfig(**small),
    "GPT2": GPT2Config(vocab_size=30, n_embd=16, n_head=2, n_layer=1),
    "T5": T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    "Llama": LlamaConfig(**small),
    "Mistral": MistralConfig(**small, num_key_value_heads=2),
}
choices = {
    "intermediate": adapters.LoRAConfig(selfattn_lora=False, intermediate_lora=True),
    "output": adapters.LoRAConfig(selfattn_lora=False, output_lora=True),
    "ia3": adapters.IA3Config(selfattn_lora=False),
}
seen = {}
for name, config in configs.items():
    model = getattr(transformers, f"{name}Model")(config)
    adapters.init(model)
    for choice, adapter in choices.items():
        model.add_adapter(choice, config=adapter)
        keys = [n for n, _ in model.named_parameters() if f".loras.{choice}.lora_B" in n]
        seen[name, choice] = sorted({k.split(".loras.")[0].split(".", 2)[-1] for k in keys})
        print(f"{name:8} {choice:13} {', '.join(seen[name, choice])}")
for name in ("Llama", "Mistral"):
    ends = [seen[name, c][0].rpartition(".")[2] for c in ("intermediate", "output", "ia3")]
    if ends != ["down_proj", "up_proj", "down_proj"]:
        raise SystemExit("this has changed")
PY
