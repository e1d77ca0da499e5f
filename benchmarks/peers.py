"""The models of `train.py`, PEFT's form of every method on them, and equal adapters on both sides.

A method is one line of `ENTRIES`: our recipe, PEFT's configuration with its options (its targets
are all linears where they are not given), and what PEFT calls our branch's tensors:

    "vera": Entry("vera{rank=64,where=linear and not head}", "VeraConfig", {"r": 64},
                  {"b": "vera_lambda_b.default", "d": "vera_lambda_d.default"}),

Both sides then get the same random numbers (`match`); a tensor in `added` gets them on top of what
it starts as. `train.py --methods vera` times it. PEFT has no bottleneck adapter: its peer here is
the usual module swap, `Bottleneck`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
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

    @property
    def task(self) -> str:
        return "CAUSAL_LM" if self.causal else "FEATURE_EXTRACTION"


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


def decoder(directory: Path, layers: int | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def real(directory: Path) -> dict[str, Base]:
    """A language model of Llama's kind in a directory, with 4 x 128 tokens."""
    like = BASES["Llama of 134 M, 2 x 128 tokens"]
    base = replace(like, make=partial(decoder, directory), inputs=tokens(4, 128, False))
    return {f"{directory.name}, 4 x 128 tokens": base}


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


@dataclass(frozen=True)
class Entry:
    """A method.

    Attributes:
        recipe: ours.
        config: the class of PEFT's configuration; empty for a module swap.
        options: its own, or a function of the base that gives them.
        names: leaf of our parameters -> PEFT's.
        added: leaves whose starting values random numbers are added to, not put in place of.
        lowers: whether `lower` has a form for it.
    """

    recipe: str
    config: str = ""
    options: Mapping[str, Any] | Callable[[Base], Mapping[str, Any]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    added: str = ""
    lowers: bool = False


LOW_RANK = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
EVERYWHERE = "where=linear and not head"

ENTRIES = {
    "lora": Entry(f"lora{{rank=8,alpha=16,{EVERYWHERE}}}", "LoraConfig",
                  {"r": 8, "lora_alpha": 16}, LOW_RANK, lowers=True),
    "dora": Entry(f"dora{{rank=8,alpha=16,{EVERYWHERE}}}", "LoraConfig",
                  {"r": 8, "lora_alpha": 16, "use_dora": True},
                  LOW_RANK | {"m": "lora_magnitude_vector.default.weight"}, "m", lowers=True),
    "ia3": Entry("ia3", "IA3Config",
                 lambda b: {"target_modules": b.scaled, "feedforward_modules": b.inner},
                 {"l": "ia3_l.default"}, "l"),
    "serial_adapter": Entry("serial_adapter{bottleneck=64}"),
    "prefix_tuning": Entry("prefix_tuning{length=20,shift_positions=true}", "PrefixTuningConfig",
                           lambda b: {"num_virtual_tokens": 20, "target_modules": None,
                                      "task_type": b.task}),
    "loha": Entry(f"loha{{rank=8,alpha=16,{EVERYWHERE}}}", "LoHaConfig", {"r": 8, "alpha": 16},
                  {f"w{i}_{side}": f"hada_w{i}_{side}.default" for i in (1, 2) for side in "ab"}),
    "lokr": Entry(f"lokr{{rank=8,alpha=16,{EVERYWHERE}}}", "LoKrConfig", {"r": 8, "alpha": 16},
                  {f"w{i}{side}": f"lokr_w{i}{side}.default"
                   for i in (1, 2) for side in ("", "_a", "_b")}),
    "oft": Entry(f"oft{{block=32,{EVERYWHERE}}}", "OFTConfig",
                 {"oft_block_size": 32, "use_cayley_neumann": False},
                 {"q": "oft_R.default.weight"}),
    "oft by series": Entry(f"oft{{block=32,series=true,{EVERYWHERE}}}", "OFTConfig",
                           {"oft_block_size": 32}, {"q": "oft_R.default.weight"}),
    "boft": Entry(f"boft{{block=4,{EVERYWHERE}}}", "BOFTConfig", {"boft_block_size": 4},
                  {"blocks": "boft_R.default", "s": "boft_s.default"}, "s"),
    "vera": Entry(f"vera{{rank=256,{EVERYWHERE}}}", "VeraConfig", {"r": 256},  # with our matrices
                  {"b": "vera_lambda_b.default", "d": "vera_lambda_d.default"}),
}  # fmt: skip


def peer(method: str, base: Base, model: Any, **options: Any) -> nn.Module:
    """`options`: of `get_peft_model`."""
    import peft

    entry = ENTRIES[method]
    if not entry.config:
        return swapped(model, base)
    given = entry.options(base) if callable(entry.options) else entry.options
    own = {"target_modules": base.linears, **given}
    own = {n: v for n, v in own.items() if v is not None}  # prompts have no targets
    return peft.get_peft_model(model, getattr(peft, entry.config)(**own), **options)


def match(method: str, program: peftfx.Program, other: Any) -> None:
    """Gives both sides the same adapter, away from its initial values."""
    entry = ENTRIES[method]
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
            added = leaf in entry.added.split()
            parameter.data.add_(noise) if added else parameter.data.copy_(noise)
            if swap is not None:
                part = getattr(swap, leaf.partition("_")[0])
                target = part.bias if leaf.endswith("bias") else part.weight
            elif attachment.slot == "key_value":
                prefix.append(parameter.data.flatten(1))
                continue
            else:
                module = attachment.site.removesuffix(".weight")
                name = entry.names.get(leaf, f"{leaf}.default")
                target = theirs[f"base_model.model.{module}.{name}"]
            target.data.copy_(parameter.data.view(target.shape))
    if prefix:
        theirs["prompt_encoder.default.embedding.weight"].data.copy_(torch.cat(prefix, 1))
