"""Writes the fixtures in `adapterhub/` with the library itself, or checks what peftfx wrote.

    pip install torch==2.13.0 adapters==1.3.0     (transformers 4.57.6, in an environment of its own)
    python -m tests.formats.write_adapterhub              write the fixtures that are missing
    python -m tests.formats.write_adapterhub DIR          load each directory MODEL-CASE that
                                                          `write_with_peftfx.py` left in DIR, and
                                                          compare the outputs stored beside it

Each fixture is what `save_adapter` (or `save_adapter_setup`) wrote, with every tensor random, and
`output.safetensors`: what the model gives with it, float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters  # pyright: ignore[reportMissingImports]
import torch
from adapters import composition  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

from .adapterhub_models import base, fill, output

HERE = Path(__file__).parent / "adapterhub"
NAME = "theirs"

_SMALL = {"reduction_factor": 4}
_EVERY = {"r": 3, "intermediate_lora": True, "output_lora": True}
_NORMED = {
    "ln_before": True, "ln_after": True, "scaling": "channel", "non_linearity": "leakyrelu",
    "reduction_factor": {"0": 4, "default": 8},
}  # fmt: skip


SAFE = ("llama-lora", "llama-seq_bn", "clip-seq_bn")
"""Written as safetensors; the library cannot with prefixes, whose tensors share memory."""


def bottleneck(kind: str, **options: Any) -> Any:
    return getattr(adapters, kind)(**{**_SMALL, **options})


def lora(**options: Any) -> Any:
    return adapters.LoRAConfig(**{"r": 2, "alpha": 6, **options})


def prefix(**options: Any) -> Any:
    return adapters.PrefixTuningConfig(
        **{"prefix_length": 3, "bottleneck_size": 4, "flat": True, **options}
    )


def union(*configs: Any) -> Any:
    return adapters.ConfigUnion(*configs)


def prompt(**options: Any) -> Any:
    return adapters.PromptTuningConfig(**{"prompt_length": 3, **options})


def phm(kind: str, **options: Any) -> Any:
    return bottleneck(kind, **{"phm_dim": 2, **options})


def gated(*configs: Any) -> Any:
    return union(*(c.replace(use_gating=True) for c in configs))


CASES: dict[str, tuple[str, Any]] = {
    "bert-double_seq_bn": ("bert", bottleneck("DoubleSeqBnConfig")),
    "bert-seq_bn": ("bert", bottleneck("SeqBnConfig")),
    "bert-par_bn": ("bert", bottleneck("ParBnConfig")),
    "bert-scaled_par_bn": ("bert", bottleneck("ParBnConfig", scaling="learned", mh_adapter=True)),
    "bert-normed": ("bert", bottleneck("DoubleSeqBnConfig", **_NORMED)),
    "bert-normed_inside": ("bert", bottleneck(
        "SeqBnConfig", ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu_new")),
    "bert-residual_after": ("bert", bottleneck("SeqBnConfig", residual_before_ln=False)),
    "bert-left_out": ("bert", bottleneck("SeqBnConfig", leave_out=[0], non_linearity="gelu")),
    "bert-lora": ("bert", lora()),
    "bert-lora_everywhere": ("bert", lora(**_EVERY, attn_matrices=["q", "k", "v"])),
    "bert-dora": ("bert", adapters.DoRAConfig(r=2, alpha=6)),
    "bert-vera": ("bert", adapters.VeraConfig(r=2, alpha=6, vera_d=0.1, vera_b=0.1)),
    "bert-lora_old": ("bert", lora(alpha=3)),
    "bert-gelu_old": ("bert", bottleneck("SeqBnConfig", non_linearity="gelu")),
    "bert-ia3": ("bert", adapters.IA3Config()),
    "bert-prefix": ("bert", prefix(flat=False)),
    "bert-prefix_flat": ("bert", prefix()),
    "bert-compacter": ("bert", phm("CompacterConfig")),
    "bert-compacter++": ("bert", phm("CompacterPlusPlusConfig")),
    "bert-phm_whole": ("bert", phm("CompacterConfig", shared_phm_rule=False,
                                   factorized_phm_rule=True, factorized_phm_W=False)),
    "bert-phm_shared": ("bert", phm("CompacterConfig", shared_W_phm=True, factorized_phm_rule=True)),
    "bert-mam": ("bert", union(prefix(flat=False), bottleneck("ParBnConfig"))),
    "bert-unipelt": ("bert", gated(prefix(), bottleneck("SeqBnConfig"), lora())),
    "llama-double_seq_bn": ("llama", bottleneck("DoubleSeqBnConfig")),
    "llama-seq_bn": ("llama", bottleneck("SeqBnConfig")),
    "llama-par_bn": ("llama", bottleneck("ParBnConfig")),
    "llama-lora": ("llama", lora(**_EVERY)),
    "llama-down_alone": ("llama", lora(intermediate_lora=True)),
    "llama-dora": ("llama", adapters.DoRAConfig(r=2, alpha=2)),
    "llama-dora_scaled": ("llama", adapters.DoRAConfig(r=2, alpha=6)),
    "llama-ia3": ("llama", adapters.IA3Config()),
    "llama-prefix_flat": ("llama", prefix()),
    "llama-compacter": ("llama", phm("CompacterConfig")),
    "gpt2-seq_bn": ("gpt2", bottleneck("SeqBnConfig", non_linearity="silu")),
    "gpt2-lora": ("gpt2", lora(**_EVERY)),
    "gpt2-ia3": ("gpt2", adapters.IA3Config()),
    "gpt2-prefix": ("gpt2", prefix(flat=False)),
    "t5-double_seq_bn": ("t5", bottleneck("DoubleSeqBnConfig", cross_adapter=True)),
    "t5-seq_bn": ("t5", bottleneck("SeqBnConfig")),
    "t5-lora": ("t5", lora(**_EVERY)),
    "t5-prefix_flat": ("t5", prefix()),
    "bart-double_seq_bn": ("bart", bottleneck("DoubleSeqBnConfig", cross_adapter=True)),
    "bart-seq_bn": ("bart", bottleneck("SeqBnConfig")),
    "bart-prefix": ("bart", prefix(flat=False)),
    "bert-prefix_left_out": ("bert", prefix(leave_out=[0])),
    "vit-double_seq_bn": ("vit", bottleneck("DoubleSeqBnConfig")),
    "vit-lora": ("vit", lora(**_EVERY)),
    "vit-ia3": ("vit", adapters.IA3Config()),
    "vit-prefix_flat": ("vit", prefix()),
    "bert-seq_bn_inv": ("bert", bottleneck("SeqBnInvConfig")),
    "bert-double_seq_bn_inv": ("bert", bottleneck("DoubleSeqBnInvConfig",
                                                  inv_adapter_reduction_factor=4)),
    "bert-inv_alone": ("bert", bottleneck("SeqBnInvConfig", output_adapter=False)),
    "gpt2-seq_bn_inv": ("gpt2", bottleneck("SeqBnInvConfig")),
    "llama-par_bn_inv": ("llama", bottleneck("ParBnConfig", inv_adapter="nice",
                                             inv_adapter_reduction_factor=2)),
    "llama-unipelt": ("llama", gated(prefix(), bottleneck("SeqBnConfig"), lora())),
    "gpt2-gated": ("gpt2", gated(bottleneck("SeqBnConfig"))),
    "bert-prompt": ("bert", prompt()),
    "bert-prompt_behind_first": ("bert", prompt(combine="prefix_after_bos")),
    "clip-seq_bn": ("clip", bottleneck("SeqBnConfig")),
    "clip-plus": ("clip", bottleneck("BnConfig", mh_adapter=True, output_adapter=True,
                                   non_linearity="gelu", original_ln_before=True,
                                   original_ln_after=False, residual_before_ln=False,
                                   scaling="channel")),
}  # fmt: skip


def adapted(name: str) -> Any:
    model = base(name)
    adapters.init(model)
    return model


def is_theirs(name: str) -> bool:
    return f".{NAME}." in name or ".adapter_fusion_layer." in name or ".other." in name


OLD = {"bert-lora_old": "adapters.1.0.1", "bert-gelu_old": None}
"""What the config of a fixture says of its version: the library then reads it as it was meant."""


def as_if_old(folder: Path, version: str | None, name: str) -> Any:
    """A model with the adapter as the library loads it once its config has another version."""
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    data = {k: v for k, v in data.items() if k != "version"} | (
        {"version": version} if version else {}
    )
    path.write_text(json.dumps(data, indent=2, sort_keys=True))
    model = adapted(name)
    model.load_adapter(str(folder), set_active=True)
    return model.eval()


def write(case: str, folder: Path) -> None:
    name, config = CASES[case]
    folder.mkdir(parents=True, exist_ok=True)
    model = adapted(name)
    model.add_adapter(NAME, config=config)
    model.set_active_adapters(NAME)
    fill(model, is_theirs, 0.3)
    model.eval().save_adapter(str(folder), NAME, use_safetensors=case in SAFE)
    for head in folder.glob("*head*"):
        head.unlink()
    if case in OLD:
        model = as_if_old(folder, OLD[case], name)
    save_file({"output": output(model, name).contiguous()}, folder / "output.safetensors")


def write_fusion(folder: Path) -> None:
    model = adapted("bert")
    setup = composition.Fuse(NAME, "other")
    model.add_adapter(NAME, config=bottleneck("SeqBnConfig"))
    model.add_adapter("other", config=bottleneck("SeqBnConfig", non_linearity="swish"))
    model.add_adapter_fusion(setup, "dynamic")
    model.set_active_adapters(setup)
    fill(model, is_theirs, 0.3)
    model.eval().save_adapter_setup(str(folder), setup)
    for head in folder.rglob("*head*"):
        head.unlink()
    save_file({"output": output(model, "bert").contiguous()}, folder / "output.safetensors")


def write_head(folder: Path) -> None:
    model = adapted("bert")
    model.add_adapter(NAME, config=bottleneck("SeqBnConfig"))
    model.set_active_adapters(NAME)
    fill(model, is_theirs, 0.3)
    with torch.no_grad():
        model.classifier.weight.mul_(3)
    model.eval().save_adapter(str(folder), NAME, with_head=True)
    save_file({"output": output(model, "bert").contiguous()}, folder / "output.safetensors")


def check(folder: Path) -> None:
    """Raises AssertionError where the library computes something else from what peftfx wrote."""
    for directory in sorted(p for p in folder.iterdir() if p.is_dir()):
        name = directory.name.partition("-")[0]
        model = adapted(name)
        if (directory / "adapter_setup.json").exists():
            model.load_adapter_setup(str(directory), set_active=True)
        else:
            safe = (directory / "adapter.safetensors").exists()
            info: dict[str, Any] = {}
            model.load_adapter(
                str(directory), set_active=True, use_safetensors=safe, loading_info=info
            )
            assert not info.get("unexpected_keys"), (directory.name, info)
        want = load_file(directory / "output.safetensors")["output"]
        gap = float((output(model.eval(), name) - want).abs().max() / want.abs().max())
        print(f"{directory.name:30} {gap:.1e}")
        assert gap < 1e-5, directory.name


def main() -> None:
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]))
        return
    for case in CASES:
        if not (HERE / case).is_dir():
            write(case, HERE / case)
    if not (HERE / "bert-fusion").is_dir():
        write_fusion(HERE / "bert-fusion")
    if not (HERE / "bert-head").is_dir():
        write_head(HERE / "bert-head")


if __name__ == "__main__":
    main()
