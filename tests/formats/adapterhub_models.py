"""Tiny models that transformers makes alike in all its versions: values by name, not by order."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
INPUTS: dict[str, dict[str, Any]] = {
    "t5": {**TEXT, "decoder_input_ids": IDS[:, :5]},
    "bart": {**TEXT, "decoder_input_ids": IDS[:, :5]},
    "vit": {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))},
    "clip": {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))},
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _make(model: str, config: str, **options: Any) -> Any:
    import transformers

    made = getattr(transformers, config)(attn_implementation="eager", **options)
    return getattr(transformers, model)(made)


_BERT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: _make("BertForSequenceClassification", "BertConfig", **_BERT),
    "clip": lambda: _make("CLIPVisionModel", "CLIPVisionConfig", image_size=8, patch_size=4, **{
        k: v for k, v in _BERT.items() if "vocab" not in k and "max" not in k
    }),
    "vit": lambda: _make("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **{
        k: v for k, v in _BERT.items() if "vocab" not in k and "max" not in k
    }),
    "llama": lambda: _make(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=32, hidden_size=16, intermediate_size=24,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        max_position_embeddings=16,
    ),
    "gpt2": lambda: _make(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=32, n_embd=16, n_head=2, n_layer=1,
        n_positions=16, n_inner=24, bos_token_id=1, eos_token_id=2,
    ),
    "t5": lambda: _make(
        "T5ForConditionalGeneration", "T5Config", vocab_size=32, d_model=16, d_kv=8, d_ff=24,
        num_layers=2, num_decoder_layers=1, num_heads=2, decoder_start_token_id=0,
    ),
    "bart": lambda: _make(
        "BartForConditionalGeneration", "BartConfig", vocab_size=32, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=16, decoder_start_token_id=2, **_ENDS,
    ),
}  # fmt: skip


_OLD = {
    "vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}  # fmt: skip
"""What transformers 4 calls modules of the vision transformer."""


def drawn(name: str, tensor: torch.Tensor, size: float) -> torch.Tensor:
    """Random numbers that its name decides (transformers 5 left the first part of CLIP's out)."""
    for new, old in _OLD.items() if name.startswith("vit.") else ():
        name = name.replace(new, old)
    generator = torch.Generator().manual_seed(
        zlib.crc32(name.replace("vision_model.", "").encode())
    )
    return torch.randn(tensor.shape, generator=generator) * size


def fill(model: nn.Module, of: Callable[[str], bool], size: float) -> None:
    """Gives the chosen parameters random values, weights of norms around 1.

    In the order of the names: of tied ones, the last one decides.
    """
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
            if of(name):
                norm = parameter.dim() == 1 and name.endswith(("weight", "scaling"))
                parameter.copy_(drawn(name, parameter, size) + norm)


def base(name: str) -> Any:
    """The model, in evaluation mode."""
    model = MODELS[name]().eval()
    fill(model, lambda _: True, 0.25)
    return model


def output(model: Any, name: str) -> torch.Tensor:
    """The logits, or of a model without head its hidden states."""
    with torch.no_grad():
        result = model(**inputs(name))
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def inputs(name: str) -> dict[str, Any]:
    return INPUTS.get(name, TEXT)
