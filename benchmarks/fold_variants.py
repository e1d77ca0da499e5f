"""What `benchmarks/fold.py` folds, and with what: a Llama of random numbers, LoRA as PEFT writes
it, and the variants, each run in a process of its own by `python -m benchmarks.fold_variants NAME
PLACES...`, which prints what it took as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors.torch
import torch

MB = 10**6
WIDTH, INNER, VOCABULARY, RANK = 2048, 5632, 32000, 16
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER), "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}  # fmt: skip
"""Name -> (inputs, outputs)."""
SHARD = 500 * MB
PREFIX = "base_model.model."


# What is folded.


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the base, in the order of its shards."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        found |= {f"{place}.{n}.weight": (out, size) for n, (size, out) in LINEARS.items()}
        found |= {
            f"{place}.{n}.weight": (WIDTH,) for n in ("input_layernorm", "post_attention_layernorm")
        }
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def layers_of(size: float) -> int:
    """How many layers make a checkpoint of so many bytes."""
    one = 2 * sum(i * o for i, o in LINEARS.values())
    return max(1, -int(-(size - 4 * VOCABULARY * WIDTH) // one))


def write_base(place: Path, layers: int, seed: int = 0) -> None:
    """A directory that transformers reads, one shard in memory at a time."""
    from transformers import LlamaConfig

    place.mkdir()
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(place)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(2**23, generator=generator).mul_(0.02).bfloat16()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        count = 2 * torch.Size(shape).numel()
        if size + count > SHARD:
            groups, size = [*groups, {}], 0
        groups[-1][name] = shape
        size += count
    listed: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        file = f"model-{index:05}-of-{len(groups):05}.safetensors"
        safetensors.torch.save_file(
            {n: _drawn(pool, s, generator) for n, s in group.items()},
            place / file,
            {"format": "pt"},
        )
        listed |= dict.fromkeys(group, file)
    total = sum(2 * torch.Size(s).numel() for s in shapes(layers).values())
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _drawn(pool: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random numbers: norms of ones, others from a pool at a random place."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start = int(torch.randint(len(pool) // 2, (), generator=generator))
    own = pool[start:].repeat(-(-torch.Size(shape).numel() // (len(pool) - start)))
    return own[: torch.Size(shape).numel()].view(shape).clone()


def write_adapter(place: Path, layers: int, seed: int = 1) -> None:
    """LoRA as PEFT writes it; about 4 % of the size of the weights."""
    place.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": [n.rpartition(".")[2] for n in LINEARS], "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, (size, out) in LINEARS.items():
            at = f"{PREFIX}model.layers.{layer}.{name}"
            a, b = ((RANK, size), (out, RANK))
            tensors[f"{at}.lora_A.weight"] = torch.randn(a, generator=generator).mul_(0.01)
            tensors[f"{at}.lora_B.weight"] = torch.randn(b, generator=generator).mul_(0.01)
    safetensors.torch.save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})


# The variants, each in a process of its own.


def plain_loop() -> Callable[..., object]:
    def work(base: Path, out: Path, adapter: Path) -> None:
        factors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        out.mkdir()
        for shard in sorted(base.glob("*.safetensors")):
            tensors = safetensors.torch.load_file(shard)
            for name, weight in tensors.items():
                at = f"{PREFIX}{name.removesuffix('.weight')}"
                if (a := factors.get(f"{at}.lora_A.weight")) is not None:
                    b = factors[f"{at}.lora_B.weight"]
                    tensors[name] = torch.addmm(weight.float(), b, a, alpha=2.0).to(weight.dtype)
            safetensors.torch.save_file(tensors, out / shard.name, {"format": "pt"})
        for path in base.glob("*.json"):
            shutil.copyfile(path, out / path.name)

    return work


def peft() -> Callable[..., object]:
    import peft as library
    import transformers

    def work(base: Path, out: Path, *adapters: Path) -> None:
        (adapter,) = adapters
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
        merged: Any = library.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # pyright: ignore
        merged.save_pretrained(out, max_shard_size=f"{SHARD // MB}MB")

    return work


def peftfx() -> Callable[..., object]:
    import transformers.models.llama.modeling_llama  # noqa: F401  # pyright: ignore

    from peftfx.directories import to_directory

    return to_directory


def together() -> Callable[..., object]:
    import transformers.models.llama.modeling_llama  # noqa: F401  # pyright: ignore

    from peftfx.many import fold_all

    return lambda base, out, *adapters: fold_all(base, adapters, out)


def mergekit_merge() -> Callable[..., object]:
    import yaml
    from mergekit.config import MergeConfiguration  # pyright: ignore
    from mergekit.merge import run_merge  # pyright: ignore
    from mergekit.options import MergeOptions  # pyright: ignore

    def work(config: Path, out: Path) -> None:
        asked: Any = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))  # pyright: ignore
        options: Any = MergeOptions(
            copy_tokenizer=False, quiet=True, out_shard_size=SHARD // 2,
            lora_merge_cache=str(out.with_name("cache")),
        )  # pyright: ignore  # fmt: skip
        run_merge(asked, str(out), options)

    return work


def mergekit_fold() -> Callable[..., object]:
    """A model with a LoRA, as mergekit names it: merged by PEFT into a folder, then copied."""
    merge = mergekit_merge()

    def work(base: Path, out: Path, adapter: Path) -> None:
        config = out.with_name("fold.yml")
        models = [{"model": f"{base}+{adapter}"}]
        said = {"merge_method": "passthrough", "models": models, "dtype": "bfloat16"}
        config.write_text(json.dumps(said))
        merge(config, out)

    return work


def peftfx_merge() -> Callable[..., object]:
    from peftfx.exporters.merge import merge

    return merge


VARIANTS: dict[str, Callable[[], Callable[..., object]]] = {
    "plain loop": plain_loop, "PEFT": peft, "peftfx": peftfx, "fold_all": together,
    "mergekit": mergekit_fold, "mergekit merge": mergekit_merge, "peftfx merge": peftfx_merge,
}  # fmt: skip
STREAMED = ("plain loop", "PEFT", "peftfx")


def one(name: str, places: list[Path]) -> dict[str, float]:
    """Runs a variant here; CPU seconds and growth of the peak of resident memory."""
    begun = time.process_time()
    work = VARIANTS[name]()
    imports, before = time.process_time() - begun, _peak()
    begun, wall = time.process_time(), time.perf_counter()
    alone = work(*places)
    seconds = alone if isinstance(alone, float) else time.process_time() - begun
    return {
        "seconds": seconds, "process": time.process_time(), "wall": time.perf_counter() - wall,
        "imports": imports, "added MB": _peak() - before,
    }  # fmt: skip


def _peak() -> float:
    """Peak of this process's resident memory, in MB (what `getrusage` says may be its parent's);
    pages of mapped files count while they are touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(one(sys.argv[1], [Path(p) for p in sys.argv[2:]])))
