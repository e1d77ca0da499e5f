"""GGUF files as llama.cpp's converters write them, by the package gguf and its published rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .peft_cases import base

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip

Kinds = Callable[[str], str]


def in_file(name: str) -> str:
    """`model.layers.1.mlp.up_proj.weight` -> `blk.1.ffn_up.weight`."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, leaf = name.rpartition(".")
    if module in whole:
        return f"{whole[module]}.{leaf}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{leaf}"


def permuted(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's `LlamaModel.permute`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def laid(config: Any, architecture: str, name: str, rows: Tensor) -> Tensor:
    """A weight's rows as files of an architecture have them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    which = next((n for n in heads if f".{n}." in name), None)
    if architecture != "llama" or which is None:
        return rows
    return permuted(rows, heads[which])


def write_base(
    path: Path,
    model: Any,
    architecture: str = "llama",
    kinds: Kinds = lambda name: "F32",
    fields: Mapping[str, Any] | None = None,
    changes: Mapping[str, Tensor] | None = None,
    tokens: bool = True,
    name: str = "tiny",
) -> Path:
    """A model as one file.

    Args:
        path: of the file.
        model: of transformers, with Llama's names.
        architecture: of the file.
        kinds: name in the file -> type of the tensor.
        fields: numbers and texts beside the usual.
        changes: name in the file -> what is added to its tensor, or the whole of a new one.
        tokens: with a vocabulary.
        name: of the model, in the header.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(3), writer.add_eos_token_id(63)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        alphabet = ["<unk>", "<s>", "</s>", "<|endoftext|>", *map(chr, range(33, 92)), "AB"]
        writer.add_token_list(alphabet)
        writer.add_token_merges(["A B"])
    for key, value in (fields or {}).items():
        add: Any = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{key}", value)
    left = dict(changes or {})
    state = model.state_dict()
    tied = config.tie_word_embeddings
    for key, tensor in state.items():
        if tied and key == "lm_head.weight":
            continue
        rows = laid(config, architecture, key, tensor.detach().float())
        rows = rows + left.pop(in_file(key), torch.zeros(()))
        kind = gguf.GGMLQuantizationType["F32" if rows.dim() == 1 else kinds(in_file(key))]
        data = gguf.quants.quantize(np.ascontiguousarray(rows.numpy()), kind)
        writer.add_tensor(in_file(key), data, raw_dtype=kind)
    for key, tensor in left.items():
        writer.add_tensor(key, tensor.numpy())
    return written(writer, path)


def write_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    alpha: float | None,
    architecture: str = "llama",
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """An adapter's tensors as one file."""
    writer = gguf.GGUFWriter(path, architecture)
    given = {"general.type": "adapter", "adapter.type": "lora"} | dict(fields or {})
    for key, value in given.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    return written(writer, path)


def written(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lora_of(folder: Path, architecture: str, name: str) -> tuple[dict[str, Tensor], float]:
    """A directory of PEFT as `convert_lora_to_gguf.py` has it: tensors and alpha."""
    config = base(name).config
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path = key.removeprefix("base_model.model.")
        if ".base_layer." in path:
            continue
        module = path.partition(".lora_")[0]
        file = in_file(f"{module}.weight")
        if "lora_A" in path or "lora_embedding_A" in path:
            tensors[f"{file}.lora_a"] = tensor.T if "embedding" in path else tensor
        elif "lora_B" in path or "lora_embedding_B" in path:
            tensors[f"{file}.lora_b"] = laid(config, architecture, f"{module}.weight", tensor)
    return tensors, float(alpha)


def merged(path: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each tensor of the base's file: `alpha / rank B A`, alpha 0 counting for
    nothing, and of the token table `A B` transposed."""
    reader = gguf.GGUFReader(path)
    field = reader.get_field("adapter.lora.alpha")
    alpha = 0.0 if field is None else float(field.contents())
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    changes: dict[str, Tensor] = {}
    for name in {n[:-7] for n in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        product = a @ b.T if name == "token_embd.weight" else b @ a
        changes[name] = scale * product
    return changes


def load(path: Path) -> Any:
    """The model of a file, by transformers."""
    from transformers import AutoModelForCausalLM, GgufConfig

    plain = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=plain
    ).eval()
