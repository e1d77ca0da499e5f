"""Folding a sharded checkpoint, beside the plain loop over its shards and Hugging Face PEFT.

    python -m benchmarks.fold [--gb 4] [--rounds 3] [--many-gb 0.5] [--adapters 30]
        [--sampled 6] [--place FOLDER] [stream] [many] [residual]

A Llama of random bfloat16 weights in shards, LoRA of rank 16 on all linears but the head, written
by PEFT. Each variant is a process of its own with one thread, in turns: CPU seconds of the work
(imports are apart, and stated), and how much the process's peak of resident memory grew by it.
With `--place`, each measurement is kept as it is made: killed, the same command goes on.
`stream`: one adapter. `many`: several adapters of a smaller base, by `fold_all` in one process,
beside one process of PEFT each (some of which are measured). `residual`: what `mode=residual`
loses beside a fold. Writes `benchmarks/fold.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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


def write_base(place: Path, layers: int) -> None:
    """A directory that transformers reads, one shard in memory at a time."""
    from transformers import LlamaConfig

    place.mkdir()
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(place)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
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


VARIANTS: dict[str, Callable[[], Callable[..., object]]] = {
    "plain loop": plain_loop, "PEFT": peft, "peftfx": peftfx, "fold_all": together,
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


def apart(name: str, *places: Path, module: str = "benchmarks.fold") -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", module, "--variant", name]
    done = subprocess.run([*command, *map(str, places)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class Notes:
    """Measurements by name, in a file; what is in it is not measured again."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.kept: dict[str, Any] = known if known.get("about") == about else {"about": about}

    def take(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.kept:
            self.kept[name] = measure()
            self.kept[f"{name}, load"] = round(os.getloadavg()[0], 1)
            self.path.write_text(json.dumps(self.kept))
        return self.kept[name]

    @property
    def load(self) -> float:
        """The machine's, in the middle of the measurements."""
        return statistics.median(v for n, v in self.kept.items() if n.endswith(", load"))


def made(place: Path, layers: int, count: int = 1) -> list[Path]:
    """A base with adapters; those of an earlier run stay."""
    if not (place / "whole").exists():
        shutil.rmtree(place / "base", ignore_errors=True)
        write_base(place / "base", layers)
    (place / "whole").touch()
    adapters = [place / f"adapter{i}" for i in range(count)]
    for seed, adapter in enumerate(adapters):
        if not (adapter / "adapter_model.safetensors").exists():
            shutil.rmtree(adapter, ignore_errors=True)
            write_adapter(adapter, layers, seed + 1)
    return adapters


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def stream(place: Path, gb: float, rounds: int) -> dict[str, Any]:
    layers = layers_of(gb * 1e9)
    (adapter,) = made(place, layers)
    sizes = [p.stat().st_size for p in (place / "base").glob("*.safetensors")]
    notes = Notes(place / "stream.json", {"layers": layers})
    seen: dict[str, list[dict[str, float]]] = {n: [] for n in STREAMED}
    names, same = list(STREAMED), 0.0
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            run = partial(apart, name, place / "base", place / name, adapter)
            fresh(place / name) if f"{name} {index}" not in notes.kept else None
            seen[name].append(notes.take(f"{name} {index}", run))
        if not index:
            pair = place / "plain loop", place / "peftfx"
            same = notes.take("same", partial(_differing, *pair))
        for name in names:
            fresh(place / name)
    result: dict[str, Any] = {
        "checkpoint MB": round(sum(sizes) / MB), "shards": len(sizes), "layers": layers,
        "largest shard MB": round(max(sizes) / MB), "rank": RANK, "rounds": rounds,
        "share of numbers that differ from the loop's": same, "load": notes.load,
        "memory allowed MB": round(1.3 * max(sizes) / MB + 150),
    }  # fmt: skip
    for name, runs in seen.items():
        medians = {k: round(statistics.median(r[k] for r in runs), 2) for k in runs[0]}
        result[name] = medians | {
            f"over {other}": _ratio(runs, seen[other])
            for other in ("plain loop", "PEFT")
            if name.startswith("peftfx")
        }
    return result


def _ratio(runs: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    pairs = zip(runs, others, strict=True)
    return round(statistics.median(r["seconds"] / o["seconds"] for r, o in pairs), 2)


def many(place: Path, gb: float, count: int, sampled: int) -> dict[str, Any]:
    """All adapters by one process, between halves of some of PEFT's, which are all alike."""
    layers = layers_of(gb * 1e9)
    adapters = made(place, layers, count)
    size = sum(p.stat().st_size for p in (place / "base").glob("*.safetensors"))
    notes = Notes(place / "many.json", {"layers": layers, "count": count})

    def theirs(adapter: Path) -> float:
        out = fresh(place / "theirs")
        return apart("PEFT", place / "base", out, adapter)["process"]

    some = adapters[: max(1, min(sampled, count))]
    half = len(some) // 2
    peft = [notes.take(a.name, partial(theirs, a)) for a in some[:half]]
    ours = notes.take(
        "fold_all", lambda: apart("fold_all", place / "base", fresh(place / "ours"), *adapters)
    )
    peft += [notes.take(a.name, partial(theirs, a)) for a in some[half:]]
    pair = place / "theirs", place / "ours" / some[-1].name
    last = notes.take("same", partial(_differing, *pair))
    each = statistics.median(peft)
    return {
        "base MB": round(size / MB), "layers": layers, "adapters": count,
        "PEFT, a process, CPU s": round(each, 1), "PEFT's processes measured": len(some),
        "fold_all, one process, CPU s": round(ours["process"], 1),
        "of it work": round(ours["seconds"], 1),
        "times faster than as many of PEFT's": round(each * count / ours["process"], 2),
        "added MB": round(ours["added MB"]), "load": notes.load,
        "share of numbers that differ, of one": last,
    }  # fmt: skip


def residual() -> dict[str, Any]:
    """Errors of one weight of 1024 x 1024 in bfloat16, relative to its change of 4 % of it, folded
    and with a branch of rank 8 beside it, by the rank of the change and how fast its singular
    values fall."""
    import peftfx

    result: dict[str, Any] = {}
    for rank, fall in ((4, 1.0), (8, 1.0), (16, 1.0), (16, 0.7), (16, 0.5), (64, 0.7)):
        torch.manual_seed(0)
        model = torch.nn.Linear(1024, 1024, bias=False).to(torch.bfloat16).eval()
        torch.nn.init.normal_(model.weight, std=0.02)
        program = peftfx.capture(model, (torch.randn(2, 3, 1024).to(torch.bfloat16),))
        program = peftfx.run(program, f"lora{{rank={rank},alpha={rank},where=linear}}")
        with torch.no_grad():
            a, b = (torch.linalg.qr(torch.randn(1024, rank)).Q for _ in range(2))
            sizes = fall ** torch.arange(rank)
            sizes *= 0.04 * float(model.weight.float().norm()) / float(sizes.norm())
            for tensor, value in zip(
                program.trainable_parameters(), (a.mT, b * sizes), strict=True
            ):
                tensor.copy_(value)
        lost = [
            peftfx.run(program, text).history[-1].certificate.measured["delta_lost"]
            for text in ("fold", "fold{mode=residual,rank=8}")
        ]
        result[f"rank {rank}, each singular value {fall:g} of the one before"] = {
            "folded": float(f"{lost[0]:.3g}"), "residual": float(f"{lost[1]:.3g}"),
            "times smaller": float(f"{lost[0] / lost[1]:.3g}"),
        }  # fmt: skip
    return result


def _differing(one_place: Path, other: Path) -> float:
    """The share of numbers by which two checkpoints differ; all names must be equal."""
    count = differ = 0
    for shard in sorted(one_place.glob("*.safetensors")):
        x, y = (safetensors.torch.load_file(p / shard.name) for p in (one_place, other))
        if x.keys() != y.keys():
            raise SystemExit(f"{shard.name} holds other tensors.")
        for name, tensor in x.items():
            count += tensor.numel()
            differ += int((tensor != y[name]).sum())
    return differ / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the base of `stream`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many-gb", type=float, default=0.5, help="size of the base of `many`")
    parser.add_argument("--adapters", type=int, default=30, help="how many of `many`")
    about = "how many of PEFT's processes of `many` are measured (default: 6)"
    parser.add_argument("--sampled", type=int, default=6, help=about)
    about = "a folder for checkpoints and measurements; kept, so that the same command goes on"
    parser.add_argument("--place", type=Path, help=about)
    parser.add_argument("--variant", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("sections", nargs="*", default=["stream", "many", "residual"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.variant:
        name, *places = options.variant
        print(json.dumps(one(name, [Path(p) for p in places])))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    path = Path(__file__).with_suffix(".json")
    sections: dict[str, Callable[[Path], Any]] = {
        "stream": lambda place: stream(place, options.gb, options.rounds),
        "many": lambda place: many(place, options.many_gb, options.adapters, options.sampled),
        "residual": lambda _: residual(),
    }
    for section in options.sections:
        with tempfile.TemporaryDirectory() as temporary:
            place = (options.place or Path(temporary)) / section
            place.mkdir(parents=True, exist_ok=True)
            done = sections[section](place)
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        result |= {section: done, "machine": machine}
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(done, indent=1), flush=True)


if __name__ == "__main__":
    main()
