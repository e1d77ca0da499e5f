"""Folding a sharded checkpoint, beside the plain loop over its shards and Hugging Face PEFT.

    python -m benchmarks.fold [--gb 4] [--rounds 3] [--many-gb 0.5] [--adapters 30]
        [--sampled 6] [--place FOLDER] [--mergekit PYTHON] [stream] [many] [merge] [residual]

A Llama of random bfloat16 weights in shards, LoRA of rank 16 on all linears but the head, written
by PEFT. Each variant is a process of its own with one thread, in turns: CPU seconds of the work
(imports are apart, and stated), and how much the process's peak of resident memory grew by it.
With `--place`, each measurement is kept as it is made: killed, the same command goes on.
mergekit is measured where `--mergekit` names the interpreter of an environment that has it.
`stream`: one adapter. `many`: several adapters of a smaller base, by `fold_all` in one process,
beside one process of PEFT each (some of which are measured). `merge`: whole models by mergekit's
configurations. `residual`: what `mode=residual` loses beside a fold. Writes `benchmarks/fold.json`.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors
import torch

from benchmarks.fold_variants import (
    MB,
    RANK,
    STREAMED,
    layers_of,
    write_adapter,
    write_base,
)

RESULT = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "docs" / "figures.md"
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"models": [("a", {"weight": 0.5}), ("b", {"weight": 0.5})]},
    "ties": {
        "base_model": "base", "parameters": {"normalize": True},
        "models": [(n, {"weight": 1.0, "density": 0.5}) for n in "ab"],
    },
}  # fmt: skip
MEASURED = "PEFT's processes measured"
START, END = "<!-- by benchmarks/fold.py -->", "<!-- end -->"


def apart(name: str, *places: Path, python: str = sys.executable) -> dict[str, float]:
    command = [python, "-W", "ignore", "-m", "benchmarks.fold_variants", name]
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


def stream(place: Path, gb: float, rounds: int, mergekit: str) -> dict[str, Any]:
    layers = layers_of(gb * 1e9)
    (adapter,) = made(place, layers)
    sizes = [p.stat().st_size for p in (place / "base").glob("*.safetensors")]
    notes = Notes(place / "stream.json", {"layers": layers})
    names, same = [*STREAMED, *(["mergekit"] if mergekit else [])], 0.0
    seen: dict[str, list[dict[str, float]]] = {n: [] for n in names}
    pythons = {"mergekit": mergekit}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            python = pythons.get(name, sys.executable)
            run = partial(apart, name, place / "base", place / name, adapter, python=python)
            fresh(place / name) if f"{name} {index}" not in notes.kept else None
            seen[name].append(notes.take(f"{name} {index}", run))
        if not index:
            pair = place / "plain loop", place / "peftfx"
            same = notes.take("same", partial(_differing, *pair))
        for name in (*names, "cache"):
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
            for other in names
            if name == "peftfx" != other
        }
    return result


def _ratio(runs: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    pairs = zip(runs, others, strict=True)
    return round(statistics.median(r["seconds"] / o["seconds"] for r, o in pairs), 2)


def merge(place: Path, gb: float, rounds: int, mergekit: str) -> dict[str, Any]:
    """Whole models, two fine-tunes of a base, in turns with mergekit; computed in float32 both."""
    if not mergekit:
        raise SystemExit("merge needs --mergekit PYTHON: its interpreter.")
    layers = layers_of(gb * 1e9)
    for seed, name in enumerate(("base", "a", "b")):
        if not (place / name / "model.safetensors.index.json").exists():
            write_base(fresh(place / name), layers, seed)
    notes = Notes(place / "merge.json", {"layers": layers})
    size = sum(p.stat().st_size for p in (place / "base").glob("*.safetensors"))
    result: dict[str, Any] = {"model MB": round(size / MB), "layers": layers, "rounds": rounds}
    variants = {"mergekit": mergekit, "peftfx": sys.executable}
    for method, said in MERGES.items():
        models = [{"model": str(place / n), "parameters": own} for n, own in said["models"]]
        base = {"base_model": str(place / said["base_model"])} if "base_model" in said else {}
        asked = {**said, **base, "merge_method": method, "models": models}
        config = place / f"{method}.yml"
        config.write_text(json.dumps({**asked, "dtype": "float32", "out_dtype": "bfloat16"}))
        seen: dict[str, list[dict[str, float]]] = {n: [] for n in variants}
        for index in range(rounds):
            for name, python in [*variants.items()][:: -1 if index % 2 else 1]:
                out, key = place / name, f"{method} {name} {index}"
                fresh(out) if key not in notes.kept else None
                run = partial(apart, f"{name} merge", config, out, python=python)
                seen[name].append(notes.take(key, run))
        pair = partial(_differing, *(place / n for n in variants))
        result[method] = {
            n: {k: round(statistics.median(r[k] for r in runs), 2) for k in runs[0]}
            for n, runs in seen.items()
        }
        result[method]["over mergekit"] = _ratio(seen["peftfx"], seen["mergekit"])
        result[method]["share of numbers that differ"] = notes.take(f"{method} same", pair)
    return result | {"load": notes.load}


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
        "PEFT, a process, CPU s": round(each, 1), MEASURED: len(some),
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
    """The share of numbers by which two checkpoints differ, however they are sharded; all names
    must be equal."""
    ours, theirs = _shard_of(one_place), _shard_of(other)
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{one_place} and {other} hold other tensors.")
    count = differ = 0
    for name, shard in ours.items():
        x, y = shard.get_tensor(name), theirs[name].get_tensor(name)
        count += x.numel()
        differ += int((x != y).sum())
    return differ / count


def _shard_of(place: Path) -> dict[str, Any]:
    """Name of a tensor -> the open file that holds it."""
    files = [safetensors.safe_open(p, "pt") for p in sorted(place.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def page(result: dict[str, Any]) -> str:
    """What `docs/figures.md` says of `stream` and `many`."""
    lines: list[str] = []
    for done in (r for n, r in sorted(result.items()) if n.startswith("stream")):
        lines += [
            f"Folding {done['checkpoint MB']:,} MB of bfloat16 in {done['shards']} shards, LoRA of "
            f"rank {done['rank']} on all linears but the head; medians of {done['rounds']} in "
            f"turns, load of the machine {done['load']:.0f}. Memory is what the process's peak "
            f"grew by (aim: {done['memory allowed MB']:,} MB).",
            "", "| | CPU s | peftfx over it | memory |", "|---|---|---|---|",
        ]  # fmt: skip
        for name in (n for n in (*STREAMED, "mergekit") if n in done):
            own, over = done[name], done["peftfx"].get(f"over {name}")
            cells = [name, f"{own['seconds']:.1f}", f"{over:.2f}" if over else ""]
            cells.append(f"{own['added MB']:,.0f} MB")
            lines.append(f"| {' | '.join(cells)} |")
        if "mergekit" in done:
            lines += ["", "mergekit has PEFT merge the adapter into a folder, and copies that."]
        same = done["share of numbers that differ from the loop's"]
        lines += [
            "",
            "Aims: 1.1 times the plain loop, 0.8 times PEFT. Of all numbers a share of "
            f"{same:.1g} differs from the loop's, which sums in float32.",
            "",
        ]
    if done := result.get("many"):
        faster = done["times faster than as many of PEFT's"]
        lines += [
            f"{done['adapters']} adapters on one base of {done['base MB']:,} MB, each into a "
            f"directory of its own: {done['fold_all, one process, CPU s']:.0f} CPU s by `fold-all`,"
            f" imports included; a process of PEFT takes {done['PEFT, a process, CPU s']:.1f} for "
            f"one (median of {done[MEASURED]}): {faster:.1f} times faster (aim 5), load "
            f"{done['load']:.0f}.",
            "",
        ]  # fmt: skip
    if done := result.get("merge"):
        lines += [
            f"Whole models of {done['model MB']:,} MB in bfloat16, two merged (TIES onto a third), "
            f"computed in float32; medians of {done['rounds']} in turns with mergekit, load "
            f"{done['load']:.0f}.",
            "",
            "| | mergekit, CPU s | peftfx | over mergekit | memory, mergekit's / ours "
            "| share of numbers that differ |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for method in MERGES:
            own = done[method]
            seconds = [f"{own[n]['seconds']:.1f}" for n in ("mergekit", "peftfx")]
            memory = " / ".join(f"{own[n]['added MB']:,.0f}" for n in ("mergekit", "peftfx"))
            cells = [method, *seconds, f"{own['over mergekit']:.2f}", f"{memory} MB"]
            lines.append(f"| {' | '.join(cells)} | {own['share of numbers that differ']:.1g} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the base of `stream`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many-gb", type=float, default=0.5, help="size of the base of `many`")
    parser.add_argument("--adapters", type=int, default=30, help="how many of `many`")
    about = "how many of PEFT's processes of `many` are measured (default: 6)"
    parser.add_argument("--sampled", type=int, default=6, help=about)
    parser.add_argument("--merge-gb", type=float, default=0.5, help="size of a model of `merge`")
    about = "the interpreter of an environment that has mergekit, to measure it, too"
    parser.add_argument("--mergekit", default="", metavar="PYTHON", help=about)
    about = "a folder for checkpoints and measurements; kept, so that the same command goes on"
    parser.add_argument("--place", type=Path, help=about)
    parser.add_argument("sections", nargs="*", default=["stream", "many", "residual"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    sections: dict[str, Callable[[Path], Any]] = {
        "stream": lambda place: stream(place, options.gb, options.rounds, options.mergekit),
        "many": lambda place: many(place, options.many_gb, options.adapters, options.sampled),
        "merge": lambda place: merge(place, options.merge_gb, options.rounds, options.mergekit),
        "residual": lambda _: residual(),
    }
    for section in options.sections:
        with tempfile.TemporaryDirectory() as temporary:
            place = (options.place or Path(temporary)) / section
            place.mkdir(parents=True, exist_ok=True)
            done = sections[section](place)
        result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        key = f"stream, {options.gb:g} GB" if section == "stream" else section
        result |= {key: done, "machine": machine}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(done, indent=1), flush=True)
        before, _, rest = PAGE.read_text().partition(START)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{START}\n{page(result)}{END}{after}")


if __name__ == "__main__":
    main()
