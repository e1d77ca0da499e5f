"""The models of `train.py`, PEFT's form of every method on them, and equal adapters on both sides.

PEFT has no bottleneck adapter: its peer here is the usual module swap, `Bottleneck`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.demo.encoder import load_model


@dataclass(frozen=True)
class Base:
    """A model with its batch, and what PEFT calls its parts."""

    make: Callable[[int | None], nn.Module]
    inputs: dict[str, Tensor]
    linears: str
    scaled: str
    inner: str
    sublayers: str
    norms: str
    causal: bool


def minilm(layers: int | None) -> nn.Module:
    model: Any = load_model()
    if layers:
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def llama(layers: int | None) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=layers or 12,
        num_attention_heads=12, num_key_value_heads=12, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(rows: int, length: int, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(5, 30000, (rows, length), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids, "labels": ids.clone()}
    lengths = torch.linspace(length // 2, length, rows).long()
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


BASES = {
    "MiniLM, 8 x 64 tokens with padding": Base(
        minilm, tokens(8, 64, True), r".*\.(query|key|value|dense)",
        r".*\.(key|value)|.*\d\.output\.dense", r".*\d\.output\.dense",
        r".*\.\d+\.(attention\.)?output\.dropout", "LayerNorm", False,
    ),
    "Llama of 134 M, 2 x 128 tokens": Base(
        llama, tokens(2, 128, False), r".*\.(\w_proj|gate_proj|up_proj|down_proj)",
        r".*\.(k_proj|v_proj|down_proj)", r".*\.down_proj",
        r".*\.(o_proj|down_proj)", "norm", True,
    ),
}  # fmt: skip


class Bottleneck(nn.Module):
    """Houlsby et al. 2019, behind the module whose place it takes."""

    def __init__(self, below: nn.Module, width: int, inner: int = 64) -> None:
        super().__init__()
        self.below, self.down, self.up = below, nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        return h + self.up(F.gelu(self.down(h)))


def swapped(model: Any, base: Base) -> nn.Module:
    model.requires_grad_(False)
    like = next(model.parameters())
    for name, module in list(model.named_modules()):
        if base.norms in name.rpartition(".")[2]:
            module.requires_grad_(True)
        if re.fullmatch(base.sublayers, name):
            model.set_submodule(name, Bottleneck(module, model.config.hidden_size).to(like))
    return model


def peer(method: str, base: Base, model: Any, **options: Any) -> nn.Module:
    """`options`: of `get_peft_model`, for LoRA and DoRA."""
    import peft

    if method == "serial_adapter":
        return swapped(model, base)
    if method == "prefix_tuning":
        task = "CAUSAL_LM" if base.causal else "FEATURE_EXTRACTION"
        return peft.get_peft_model(
            model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=20)
        )
    if method == "ia3":
        return peft.get_peft_model(
            model, peft.IA3Config(target_modules=base.scaled, feedforward_modules=base.inner)
        )
    if method in OTHERS:
        return peft.get_peft_model(model, OTHERS[method](peft, {"target_modules": base.linears}))
    if method == "vera":  # of one seed, so with our matrices
        return peft.get_peft_model(model, peft.VeraConfig(r=256, target_modules=base.linears))
    dora = method == "dora"
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=base.linears, use_dora=dora)
    return peft.get_peft_model(model, config, **options)


OTHERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "loha": lambda peft, options: peft.LoHaConfig(r=8, alpha=16, **options),
    "lokr": lambda peft, options: peft.LoKrConfig(r=8, alpha=16, **options),
    "oft": lambda peft, options: peft.OFTConfig(
        oft_block_size=32, use_cayley_neumann=False, **options
    ),
    "oft by series": lambda peft, options: peft.OFTConfig(oft_block_size=32, **options),
    "boft": lambda peft, options: peft.BOFTConfig(boft_block_size=4, **options),
}
"""PEFT's configurations of further types, by method."""

SUFFIXES = {"a": "lora_A.default.weight", "b": "lora_B.default.weight",
            "m": "lora_magnitude_vector.default.weight", "l": "ia3_l.default",
            **{f"w{i}_{side}": f"hada_w{i}_{side}.default" for i in (1, 2) for side in "ab"},
            "q": "oft_R.default.weight", "blocks": "boft_R.default", "s": "boft_s.default",
            }  # fmt: skip


def match(program: peftfx.Program, other: Any) -> None:
    """Gives both sides the same adapter, away from its initial values."""
    theirs = dict(other.named_parameters())
    bottlenecks = iter(m for m in other.modules() if isinstance(m, Bottleneck))
    prefix: list[Tensor] = []
    generator = torch.Generator().manual_seed(2)
    for attachment in program.attachments:
        branch, swap = program.branch(attachment), None
        if attachment.slot == "serial":
            swap = next(bottlenecks)
        for leaf, parameter in branch.named_parameters():
            noise = (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter)
            parameter.data.add_(noise) if leaf in "mls" else parameter.data.copy_(noise)
            if swap is not None:
                part = getattr(swap, leaf.partition("_")[0])
                target = part.bias if leaf.endswith("bias") else part.weight
            elif attachment.slot == "key_value":
                prefix.append(parameter.data.flatten(1))
                continue
            else:
                module = attachment.site.removesuffix(".weight")
                path = f"base_model.model.{module}"
                names = (f"vera_lambda_{leaf}.default", SUFFIXES.get(leaf), f"lokr_{leaf}.default")
                keys = (f"{path}.{own}" for own in names)
                target = next(theirs[key] for key in keys if key in theirs)
            target.data.copy_(parameter.data.view(target.shape))
    if prefix:
        theirs["prompt_encoder.default.embedding.weight"].data.copy_(torch.cat(prefix, 1))
