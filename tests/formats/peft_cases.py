"""Small models and adapters of real PEFT, with every tensor random."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftfx

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
TEXT = {"input_ids": IDS, "attention_mask": MASK}
TYPES = ("q_proj", "v_proj")


class Attention(nn.Module):
    """torch's own attention, whose three projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x, need_weights=False)[0])


class Convolutions(nn.Module):
    """One plain, one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).mean((2, 3)))


def _transformer(model: str, config: str, **options: Any) -> Any:
    import transformers

    small = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4}
    made = getattr(transformers, config)(**(small | heads | options))
    return getattr(transformers, model)(made)


def _unet() -> Any:
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8,
        attention_head_dim=2,
    )  # fmt: skip


_EXPERTS = {
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "num_experts": 4,
    "num_local_experts": 4, "moe_intermediate_size": 24,
}  # fmt: skip

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _transformer("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=2,
                                  num_key_value_heads=2),
    "bert": lambda: _transformer("BertForSequenceClassification", "BertConfig",
                                 initializer_range=0.2),
    "t5": lambda: _transformer("T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=48,
                               num_layers=1, num_heads=4, decoder_start_token_id=0),
    "gpt2": lambda: _transformer("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=4, n_layer=1,
                                 n_positions=32, bos_token_id=0, eos_token_id=0),
    "vit": lambda: _transformer("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8),
    "qwen3_moe": lambda: _transformer("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_EXPERTS),
    "gpt_oss": lambda: _transformer("GptOssForCausalLM", "GptOssConfig", **_EXPERTS),
    "t5 of 2": lambda: _transformer("T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8,
                                    d_ff=48, num_hidden_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0),
    "bart": lambda: _transformer("BartForConditionalGeneration", "BartConfig", d_model=32,
                                 num_hidden_layers=3, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
                                 decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                                 max_position_embeddings=64),
    "unet": _unet,
    "attention": Attention,
    "convolutions": Convolutions,
}  # fmt: skip

INPUTS: dict[str, dict[str, Any]] = {
    "t5": {**TEXT, "decoder_input_ids": IDS},
    "t5 of 2": {**TEXT, "decoder_input_ids": IDS[:, :5]},
    "bart": {**TEXT, "decoder_input_ids": IDS[:, :5]},
    "vit": {"pixel_values": torch.randn(2, 3, 16, 16)},
    "unet": {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5]),
             "encoder_hidden_states": torch.randn(2, 5, 8)},
    "attention": {"x": torch.randn(2, 5, 16)},
    "convolutions": {"x": torch.randn(2, 4, 6, 6)},
}  # fmt: skip


def lora(*modules: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": 4, "target_modules": list(modules or TYPES), **options}


_PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
_BOTH = {"target_modules": list(TYPES)}
_BANK = {"num_vectors": 12, "vector_length": 8, "topk": 2, **_BOTH}

CASES: dict[str, tuple[str, tuple[str, dict[str, Any]]]] = {
    "lora": ("llama", lora(lora_alpha=16)),
    "patterns": ("llama", lora(*TYPES, "down_proj", alpha_pattern={"v_proj": 5},
                               rank_pattern={"layers.0.q_proj": 2, "down_proj": 3})),
    "rslora": ("llama", lora(use_rslora=True)),
    "dora": ("llama", lora(use_dora=True)),
    "biases": ("bert", lora("query", "value", bias="all")),
    "own biases": ("bert", lora("query", bias="lora_only")),
    "lora bias": ("bert", lora("query", lora_bias=True)),
    "table": ("llama", lora("embed_tokens", "q_proj")),
    "head": ("llama", lora("lm_head", "q_proj")),
    "head saved": ("llama", lora(modules_to_save=["lm_head"])),
    "token rows": ("llama", lora(trainable_token_indices=[int(IDS[0, 0]), int(IDS[1, 2])])),
    "pissa": ("llama", lora(init_lora_weights="pissa")),
    "olora": ("llama", lora(init_lora_weights="olora")),
    "kasa": ("llama", lora(kasa_config={"beta": 1e-4, "gamma": 1e-3})),
    "blocks": ("llama", lora("q_proj", "down_proj", use_bdlora={
        "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2})),
    "pooled": ("llama", lora(use_qalora=True, qalora_group_size=4)),
    "velora": ("llama", lora(velora_config={"num_groups": 4})),
    "monteclora": ("llama", lora(monteclora_config={"num_samples": 2})),
    "new biases": ("llama", lora(lora_bias=True)),
    "invocation": ("llama", lora(alora_invocation_tokens=IDS[0, 2:4].tolist(),
                                 task_type="CAUSAL_LM")),
    "adalora": ("llama", ("AdaLoraConfig", {"init_r": 6, "target_r": 3, "total_step": 10, **_BOTH})),
    "ia3": ("llama", ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"],
                                    "feedforward_modules": ["down_proj"]})),
    "prompt": ("llama", ("PromptTuningConfig", _PROMPT)),
    "p-tuning": ("llama", ("PromptEncoderConfig", {**_PROMPT, "encoder_hidden_size": 16})),
    "prefix": ("llama", ("PrefixTuningConfig", _PROMPT)),
    "prefix of t5": ("t5 of 2", ("PrefixTuningConfig", _PROMPT | {"task_type": "SEQ_2_SEQ_LM"})),
    "prefix of bart": ("bart", ("PrefixTuningConfig", _PROMPT | {"task_type": "SEQ_2_SEQ_LM"})),
    "multitask": ("llama", ("MultitaskPromptTuningConfig", {**_PROMPT, "num_tasks": 1})),
    "loha": ("llama", ("LoHaConfig", {"r": 4, **_BOTH})),
    "lokr": ("llama", ("LoKrConfig", {"r": 2, "alpha": 6, **_BOTH})),
    "vera": ("llama", ("VeraConfig", {"r": 4, **_BOTH})),
    "vera of a key": ("llama", ("VeraConfig", {"r": 4, "save_projection": False, **_BOTH})),
    "vblora": ("llama", ("VBLoRAConfig", _BANK)),
    "vblora, largest": ("llama", ("VBLoRAConfig", {**_BANK, "topk": 3,
                                                   "save_only_topk_weights": True})),
    "norms": ("llama", ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]})),
    "shira": ("llama", ("ShiraConfig", {"r": 2, **_BOTH})),
    "oft": ("llama", ("OFTConfig", {"oft_block_size": 4, **_BOTH})),
    "exact oft": ("llama", ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False,
                                          **_BOTH})),
    "boft": ("bert", ("BOFTConfig", {"boft_block_size": 4, "bias": "boft_only",
                                     "target_modules": ["query", "value"]})),
    "boft convolution": ("convolutions", ("BOFTConfig", {"boft_block_num": 4, "target_modules": ["a", "c"],
                                                         "boft_block_size": 0})),
    "miss": ("llama", ("MissConfig", {"r": 4, **_BOTH})),
    "hira": ("llama", ("HiraConfig", {"r": 4, **_BOTH})),
    "hra": ("llama", ("HRAConfig", {"r": 3, **_BOTH})),
    "orthogonal hra": ("llama", ("HRAConfig", {"r": 4, "apply_GS": True, **_BOTH})),
    "c3a": ("llama", ("C3AConfig", {"block_size": 8, **_BOTH})),
    "delora": ("llama", ("DeloraConfig", {"r": 4, **_BOTH})),
    "beft": ("bert", ("BeftConfig", {"target_modules": ["query", "dense"]})),
    "cartridge": ("llama", ("CartridgeConfig", _PROMPT)),
    "rows": ("llama", ("TrainableTokensConfig", {"token_indices": [int(IDS[0, 0])],
                                                 "target_modules": ["embed_tokens"]})),
    "classifier": ("bert", lora("query", "value", "dense", task_type="SEQ_CLS")),
    "encoder-decoder": ("t5", lora("q", "v", "wo")),
    "dora in both": ("t5", lora("q", use_dora=True)),
    "fused": ("gpt2", lora("c_attn", "c_proj", fan_in_fan_out=True)),
    "fused dora": ("gpt2", lora("c_attn", fan_in_fan_out=True, use_dora=True)),
    "fused ia3": ("gpt2", ("IA3Config", {"target_modules": ["c_attn", "mlp.c_proj"],
                                         "feedforward_modules": ["mlp.c_proj"],
                                         "fan_in_fan_out": True})),
    "vision": ("vit", lora("q_proj", "v_proj", "query", "value", "projection",
                           modules_to_save=["classifier"])),
    "unet": ("unet", lora("to_q", "to_v", "conv1", "proj_in")),
    "experts": ("qwen3_moe", lora("q_proj", target_parameters=["mlp.experts.gate_up_proj",
                                                               "mlp.experts.down_proj"])),
    "experts in out": ("gpt_oss", lora("q_proj", target_parameters=["mlp.experts.gate_up_proj",
                                                                    "mlp.experts.down_proj"])),
    "attention": ("attention", lora("attn")),
    "convolutions": ("convolutions", lora("a", "b", "c")),
    "dora convolution": ("convolutions", lora("a", use_dora=True)),
}  # fmt: skip


def base(name: str) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at zero, which hides much
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name: str) -> dict[str, Any]:
    return INPUTS.get(name, TEXT)


@functools.cache
def program(name: str) -> peftfx.Program:
    return peftfx.capture(base(name), kwargs=inputs(name))


def output(result: Any, tokens: int | None = None) -> Tensor:
    """Logits or the like; of prompts, those of the user's tokens."""
    if not isinstance(result, Tensor):
        keys = ("logits", "last_hidden_state", "sample")
        named = result if isinstance(result, Mapping) else vars(result)
        result = next(named[k] for k in keys if named.get(k) is not None)
    return result if tokens is None else result[:, -tokens:]


def computed(model: Any, name: str, case: str) -> Tensor:
    """What a model of PEFT gives."""
    more = {"task_ids": torch.zeros(2, dtype=torch.long)} if case == "multitask" else {}
    with torch.no_grad():
        result = model(**inputs(name), **more)
    return output(result, IDS.shape[1] if MODELS[name] is MODELS["llama"] else None)


def write(case: str, directory: Path) -> Tensor:
    """Saves an adapter that PEFT made, with noise on all that trains; what its model computes."""
    import peft

    name, (config, options) = CASES[case]
    model = peft.get_peft_model(base(name), getattr(peft, config)(**options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval().save_pretrained(str(directory))
    return computed(model, name, case)
