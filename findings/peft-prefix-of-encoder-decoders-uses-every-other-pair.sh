#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0, CPU): prefix-tuning of an encoder-decoder stores one
# pair of keys and values a layer, makes two copies of all of them behind one another, and cuts the
# result into fours. Of each four the first pair goes to the decoder's own attention and the second,
# meant for the cross attention, is thrown away. So decoder layer l reads pair 2 l modulo the number of
# layers: with an even number, half of the stored pairs are never read and get no gradient, and two
# layers share each of the others; with an odd number every pair is read, at another layer than its own.
# Nothing is raised or warned of.
#
# Seen: T5 of 2 and 4 layers: the gradients of pairs 1 and 1, 3 are zero; BART of 3 layers: none is
# zero; with pair 1 of T5 replaced by other numbers, the logits stay the same bit for bit.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$place/venv/bin/python" -W ignore - <<'PY'
import peft
import torch
from transformers import (
    BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration,
)

ids, answer = torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (2, 5))


def adapted(kind, layers):
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4)
        model = T5ForConditionalGeneration(config)
    else:
        config = BartConfig(
            vocab_size=64, d_model=32, encoder_layers=layers, decoder_layers=layers,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64,
        )
        model = BartForConditionalGeneration(config)
    prefix = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model.eval(), prefix).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))
    return model, weight


def unread(kind, layers):
    model, weight = adapted(kind, layers)
    model(input_ids=ids, decoder_input_ids=answer).logits.square().sum().backward()
    reach = weight.grad.view(3, layers, -1).abs().amax((0, 2))
    return [layer for layer in range(layers) if reach[layer] == 0]


seen = {(kind, n): unread(kind, n) for kind, n in (("t5", 2), ("t5", 4), ("bart", 3))}
print("pairs without a gradient:", seen)
assert seen == {("t5", 2): [1], ("t5", 4): [1, 3], ("bart", 3): []}

model, weight = adapted("t5", 2)
with torch.no_grad():
    before = model(input_ids=ids, decoder_input_ids=answer).logits
    weight.view(3, 2, -1)[:, 1] = 100.0
    after = model(input_ids=ids, decoder_input_ids=answer).logits
print("same logits with another pair 1:", torch.equal(before, after))
assert torch.equal(before, after)
PY
