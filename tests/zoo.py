"""The zoo: tiny random models of many architectures, with makers of their inputs.

Every model has at least two layers, grouped queries where its family has them, dropout where it
has dropout, and sizes that tell roles apart: width 32, feed-forward 56, 4 heads of 8.

    entry = ZOO["llama"]
    program = peftfx.capture(entry.build(), kwargs=entry.inputs(3, 9))
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .zoo_plain import (
    HEADS,
    INNER,
    WIDTH,
    Looped,
    ResNet,
    SelfAttention,
    absorb_keys,
    mlp,
    transformer_encoder,
)

VOCABULARY, KV_HEADS = 99, 2
IMAGE_TOKEN = VOCABULARY - 1

Inputs = Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        make: builds the model.
        inputs: keyword inputs for a batch size and a number of tokens (fixed seed).
    """

    make: Callable[[], Any]
    inputs: Inputs

    def build(self) -> Any:
        """The model with fixed random weights, in evaluation mode."""
        torch.manual_seed(0)
        return self.make().eval()


def _seeded(make: Inputs) -> Inputs:
    def inputs(batch: int = 3, tokens: int = 9) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make(batch, tokens)

    return inputs


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, IMAGE_TOKEN, (batch, tokens))


def text(batch: int, tokens: int) -> dict[str, Tensor]:
    ids = _ids(batch, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens_only(batch: int, tokens: int) -> dict[str, Tensor]:
    return {"input_ids": _ids(batch, tokens)}


def text_to_text(batch: int, tokens: int) -> dict[str, Tensor]:
    return {**text(batch, tokens), "decoder_input_ids": _ids(batch, tokens + 2)}


def images(side: int, name: str = "pixel_values") -> Inputs:
    return lambda batch, tokens: {name: torch.randn(batch, 3, side, side)}


def text_and_images(batch: int, tokens: int) -> dict[str, Tensor]:
    return {**text(batch, tokens), **images(16)(batch, tokens)}


def images_in_text(batch: int, tokens: int) -> dict[str, Tensor]:
    """Four places of each text stand for the four patches of its image."""
    inputs = text(batch, tokens + 4)
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    return {**inputs, "pixel_values": torch.randn(batch, 3, 16, 16)}


def sound(batch: int, tokens: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(batch, 12, 28),
        "decoder_input_ids": _ids(batch, tokens),
    }


def noisy_images(batch: int, tokens: int) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(batch, 4, 16, 16),
        "timestep": torch.randint(0, 10, (batch,)),
        "encoder_hidden_states": torch.randn(batch, tokens, 24),
    }


def noisy_classes(batch: int, tokens: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.randint(0, 10, (batch,)),
        "class_labels": torch.randint(0, 9, (batch,)),
    }


def minilm() -> Any:
    from peftfx.demo.encoder import model_directory

    auto = importlib.import_module("transformers").AutoModel
    return auto.from_pretrained(model_directory())


def _library(model: str, config: Callable[[], Any], package: str = "transformers") -> Any:
    return getattr(importlib.import_module(package), model)(config())


def _config(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("transformers"), name)(**options)


def _hf(model: str, config: str, inputs: Inputs, **options: Any) -> Entry:
    return Entry(lambda: _library(model, _config(config, **options)), _seeded(inputs))


_ENCODER: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2,
    num_attention_heads=HEADS, max_position_embeddings=64,
)  # fmt: skip
_IDS: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_VISION: dict[str, Any] = dict(
    hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
    image_size=16, patch_size=4,
)  # fmt: skip
_PRE_LN_DECODER: dict[str, Any] = dict(
    vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=INNER,
    use_cache=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
    decoder_ffn_dim=INNER, use_cache=False, dropout=0.1, attention_dropout=0.1,
)  # fmt: skip


_PER_LAYER: dict[str, Any] = dict(
    layer_types=["full_attention"] * 2, num_kv_shared_layers=1, sliding_window=8, head_dim=8,
    hidden_size_per_layer_input=12, vocab_size_per_layer_input=VOCABULARY,
)  # fmt: skip
_GATED_DELTA: dict[str, Any] = dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip
_LATENT: dict[str, Any] = dict(
    num_key_value_heads=HEADS, n_shared_experts=1, n_routed_experts=6, moe_intermediate_size=24,
    kv_lora_rank=12, q_lora_rank=20, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    n_group=2, topk_group=1, num_experts_per_tok=2,
)  # fmt: skip


def _encoder(model: str, config: str, **options: Any) -> Entry:
    return _hf(model, config, text, **{**_ENCODER, **options})


def _decoder(family: str, **options: Any) -> Entry:
    own: dict[str, Any] = dict(num_key_value_heads=KV_HEADS, use_cache=False, attention_dropout=0.1)
    config = options.pop("config", f"{family}Config")
    return _hf(f"{family}ForCausalLM", config, text, **{**_ENCODER, **_IDS, **own, **options})


def _clip() -> Any:
    sub = dict(_ENCODER, projection_dim=16, **dict(_IDS, eos_token_id=VOCABULARY - 1))
    config = _config(
        "CLIPConfig", projection_dim=16, text_config=sub,
        vision_config=dict(_VISION, projection_dim=16),
    )  # fmt: skip
    return _library("CLIPModel", config)


def _llava() -> Any:
    vision = _config("CLIPVisionConfig", **dict(_VISION, patch_size=8, hidden_size=40))()
    words = _config("LlamaConfig", **_ENCODER, **_IDS, num_key_value_heads=KV_HEADS)()
    config = _config(
        "LlavaConfig", vision_config=vision, text_config=words, image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
    )  # fmt: skip
    return _library("LlavaForConditionalGeneration", config)


def _unet() -> Any:
    return importlib.import_module("diffusers").UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, dropout=0.1,
        block_out_channels=(16, 32), cross_attention_dim=24, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def _dit() -> Any:
    return importlib.import_module("diffusers").DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=8, in_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=8, dropout=0.1,
    )  # fmt: skip


ZOO: dict[str, Entry] = {
    # Plain torch.
    "mlp": Entry(mlp, _seeded(lambda batch, tokens: {"input": torch.randn(batch, 16)})),
    "resnet": Entry(ResNet, _seeded(images(16, "x"))),
    "transformer_encoder": Entry(
        transformer_encoder, _seeded(lambda b, t: {"src": torch.randn(b, t, WIDTH)})
    ),
    "multihead_attention": Entry(
        SelfAttention, _seeded(lambda b, t: {"x": torch.randn(b, t, WIDTH)})
    ),
    # Text encoders.
    "bert": _encoder("BertForSequenceClassification", "BertConfig"),
    "bert_eager": _encoder("BertModel", "BertConfig", attn_implementation="eager"),
    "roberta": _encoder("RobertaForMaskedLM", "RobertaConfig", pad_token_id=1),
    "distilbert": _hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", text,
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=HEADS, hidden_dim=INNER,
        max_position_embeddings=64,
    ),
    "minilm": Entry(minilm, _seeded(text)),
    # Text decoders.
    "gpt2": _hf("GPT2LMHeadModel", "GPT2Config", text, **_PRE_LN_DECODER),
    "gpt_neox": _hf(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", text,
        **_ENCODER, use_cache=False, hidden_dropout=0.1, attention_dropout=0.1,
    ),
    "phi": _decoder("Phi", resid_pdrop=0.1, embd_pdrop=0.1),
    "phi3": _decoder("Phi3", resid_pdrop=0.1),
    "llama": _decoder("Llama", tie_word_embeddings=True),
    "llama_eager": _decoder("Llama", attn_implementation="eager"),
    "mistral": _decoder("Mistral", sliding_window=32),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma2": _decoder("Gemma2", head_dim=8, sliding_window=8, attn_implementation="eager"),
    "gemma3": _decoder("Gemma3", config="Gemma3TextConfig", head_dim=8, sliding_window=8),
    "mixtral": _decoder("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": _decoder(
        "Qwen2Moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    # Beyond the list: interleaved groups, alibi, latent attention, shared layers, interleaved
    # experts, two kinds of token mixers, reduced keys with a convolutional feed-forward.
    "falcon": _hf(
        "FalconForCausalLM", "FalconConfig", text, vocab_size=VOCABULARY, hidden_size=WIDTH,
        num_hidden_layers=2, num_attention_heads=HEADS, num_kv_heads=KV_HEADS, use_cache=False,
        new_decoder_architecture=True, ffn_hidden_size=INNER, **_IDS,
    ),
    "bloom": _hf(
        "BloomForCausalLM", "BloomConfig", text, vocab_size=VOCABULARY, hidden_size=WIDTH,
        n_layer=2, n_head=HEADS, use_cache=False, hidden_dropout=0.1, attention_dropout=0.1, **_IDS,
    ),
    "deepseek_v3": _decoder("DeepseekV3", **_LATENT, first_k_dense_replace=0),
    "albert": _encoder("AlbertModel", "AlbertConfig", embedding_size=24, hidden_dropout_prob=0.1),
    "gpt_oss": _decoder("GptOss", num_local_experts=5, num_experts_per_tok=2, head_dim=8),
    "lfm2": _decoder("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
    "segformer": _hf(
        "SegformerForImageClassification", "SegformerConfig", images(32), num_encoder_blocks=1,
        depths=[2], sr_ratios=[2], hidden_sizes=[WIDTH], patch_sizes=[3], strides=[2],
        num_attention_heads=[HEADS], mlp_ratios=[2], drop_path_rate=0.0,
    ),
    # Gates among the queries, borrowed keys and values, embeddings for every layer, several streams,
    # mixers beside or between attentions, a shared block, a loop, weights read as views.
    "qwen3_5": _decoder(
        "Qwen3_5", config="Qwen3_5TextConfig", **_GATED_DELTA, layer_types=["full_attention"] * 2
    ),
    "qwen3_next": _decoder(
        "Qwen3Next", **_GATED_DELTA, layer_types=["linear_attention", "full_attention"],
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "gemma4": _decoder("Gemma4", config="Gemma4TextConfig", **_PER_LAYER, global_head_dim=16),
    "gemma3n": _decoder(
        "Gemma3n", config="Gemma3nTextConfig", **_PER_LAYER, laurel_rank=6, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 2,
    ),
    "falcon_h1": _decoder(
        "FalconH1", head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4,
        mamba_chunk_size=8,
    ),
    "nemotron_h": _hf(
        "NemotronHForCausalLM", "NemotronHConfig", text, vocab_size=VOCABULARY, hidden_size=WIDTH,
        intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=8, layers_block_type=["mamba", "moe", "attention", "mlp"], mamba_num_heads=8,
        mamba_head_dim=8, n_groups=2, ssm_state_size=4, chunk_size=8, n_routed_experts=6,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, use_cache=False, **_IDS,
    ),
    "zamba2": _hf(
        "Zamba2ForCausalLM", "Zamba2Config", text, vocab_size=VOCABULARY, hidden_size=WIDTH,
        intermediate_size=INNER, num_attention_heads=HEADS, num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"], mamba_d_state=4, n_mamba_heads=8,
        chunk_size=8, adapter_rank=6, use_cache=False, **_IDS,
    ),
    "looped": Entry(lambda: Looped(VOCABULARY), _seeded(tokens_only)),
    "absorbed": Entry(
        lambda: absorb_keys(_decoder("DeepseekV3", **_LATENT, first_k_dense_replace=2).make()),
        _seeded(tokens_only),
    ),
    "modernbert": _encoder(
        "ModernBertForMaskedLM", "ModernBertConfig", **_IDS, cls_token_id=1, sep_token_id=2,
        local_attention=8, initializer_range=0.2, attention_dropout=0.1, mlp_dropout=0.1,
        layer_types=["full_attention", "sliding_attention"],
    ),
    # Text to text.
    "t5": _hf(
        "T5ForConditionalGeneration", "T5Config", text_to_text,
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=2, num_heads=HEADS,
        use_cache=False, feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    ),
    "bart": _hf(
        "BartForConditionalGeneration", "BartConfig", text_to_text,
        **_SEQ2SEQ, max_position_embeddings=64,
    ),
    # Vision, sound, both with text.
    "vit": _hf(
        "ViTForImageClassification", "ViTConfig", images(16), **_VISION,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    ),
    "swin": _hf(
        "SwinForImageClassification", "SwinConfig", images(16),
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        mlp_ratio=3.0, drop_path_rate=0.0, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    ),
    "convnext": _hf(
        "ConvNextForImageClassification", "ConvNextConfig", images(32),
        hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=32, drop_path_rate=0.0,
    ),
    "clip": Entry(_clip, _seeded(text_and_images)),
    "llava": Entry(_llava, _seeded(images_in_text)),
    "whisper": _hf(
        "WhisperForConditionalGeneration", "WhisperConfig", sound, **_SEQ2SEQ, **_IDS,
        num_mel_bins=12, max_source_positions=14, max_target_positions=64,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    ),
    # State space.
    "mamba": _hf(
        "MambaForCausalLM", "MambaConfig", tokens_only, vocab_size=VOCABULARY, hidden_size=WIDTH,
        state_size=4, num_hidden_layers=2, use_cache=False, **_IDS,
    ),
    "mamba2": _hf(
        "Mamba2ForCausalLM", "Mamba2Config", tokens_only, vocab_size=VOCABULARY,
        hidden_size=WIDTH, state_size=4, num_hidden_layers=2, use_cache=False, num_heads=8,
        head_dim=8, n_groups=1, chunk_size=8, **_IDS,
    ),
    # Diffusion.
    "unet": Entry(_unet, _seeded(noisy_images)),
    "dit": Entry(_dit, _seeded(noisy_classes)),
}  # fmt: skip
"""Every architecture by name."""
