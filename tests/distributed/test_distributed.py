"""Two ranks against one process: gradients, losses, checkpoints, folding, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
import peftfx.distributed as pd
from peftfx.rewriter.errors import CorruptFileError, RanksError

from ..captures import captures
from ..recipes import METHODS, method_class
from .job import RECIPE, base, launch, optimizer_of, prepared, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have run all jobs; the last one kills the second rank."""
    made = tmp_path_factory.mktemp("ranks")
    program = prepared(base())
    optimizer = optimizer_of(program.module)
    train(program.module, optimizer, 3, shared=False)
    pd.save_checkpoint(made / "one", program, optimizer, step=3)
    exits = launch(made, ["engines", "methods", "resume", "refusals", "crash"])
    assert [code for code, _ in exits] == [0, -signal.SIGKILL], "\n".join(t for _, t in exits)
    return made


def results(folder: Path, name: str) -> Any:
    """What both ranks returned from a job."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def test_engines_train_as_one_process_does(folder: Path) -> None:
    ours, theirs = results(folder, "engines")
    assert ours == theirs
    alone = ours.pop("alone")
    assert alone[0] - alone[-1] > 0.1
    for name, got in ours.items():
        assert got["gradients"] < 1e-6, name
        assert got["curve"] == pytest.approx(alone, rel=1e-6), name
        assert got["sharded"] == (0 if name in ("ddp", "accelerate") else got["parameters"])
    whole, parts = ours["ddp"]["held"], ours["blocks"]["held"]
    for i, rank in enumerate(whole):
        for what in ("parameters", "gradients", "optimizer"):
            assert parts[i][what] == pytest.approx(rank[what] / 2, rel=0.01), what
        assert parts[i]["activations"] == rank["activations"]
        assert 0 < ours["checkpointed"]["held"][i]["activations"] < rank["activations"] / 2
        fewer = ours["recomputed"]["held"][i]["activations"]
        assert rank["activations"] / 2 < fewer < rank["activations"]


def test_every_method_shards_by_block(folder: Path) -> None:
    ours, theirs = results(folder, "methods")
    assert ours == theirs and set(ours) == set(METHODS)
    for name, got in ours.items():
        assert got["gradients"] < 1e-6, name
        assert got["losses"][0] == pytest.approx(got["losses"][1], rel=1e-5), name
        assert abs(got["losses"][0][0] - got["losses"][0][-1]) > 1e-5, name
        assert got["tensors"] < 1e-4, name
    watched = {n for n in METHODS if method_class(n).controller.whole}
    assert {n for n, got in ours.items() if got["whole"]} == watched
    assert {"adalora", "sora", "dylora"} <= watched and not {"lora", "dora"} & watched


def test_checkpoints_fit_any_number_of_ranks(folder: Path) -> None:
    captured = base()
    program = prepared(captured)
    curve = train(program.module, optimizer_of(program.module), 5, shared=False)[3:]
    ours, theirs = results(folder, "resume")
    assert ours == theirs
    assert ours["from two"] == [3, 2, ours["two"]]
    assert ours["from one"][:2] == [3, 1]
    assert ours["from one"][2] == pytest.approx(curve, rel=1e-6)
    assert ours["two"] == pytest.approx(curve, rel=1e-6)
    for name in ("one", "two"):
        again = peftfx.run(captured, RECIPE)
        optimizer = optimizer_of(again.module)
        found = pd.load_checkpoint(pd.latest(folder / name) or "", again, optimizer)
        assert (found.step, found.ranks) == (3, 1 if name == "one" else 2)
        assert found.extra == ({} if name == "one" else {"note": "half way"})
        if name == "two":
            loaded = peftfx.load(captured, folder / "adapter").adapter_tensors("lora")
            held = again.adapter_tensors("lora")
            assert all(torch.equal(t, held[n]) for n, t in loaded.items()) and loaded
        assert train(again.module, optimizer, 2, shared=False) == pytest.approx(curve, rel=1e-6)
    sizes = [sum(f.stat().st_size for f in (folder / n).rglob("*.*")) for n in ("one", "two")]
    assert max(sizes) < 60_000 < sum(t.nbytes for t in captured.base_tensors().values())
    check_folding(ours["folding"], captured)
    check_thin(ours["thin"], folder)


def check_folding(found: Any, captured: peftfx.Program) -> None:
    assert found["equal"] and found["tensors"] == len(captured.state_names)
    assert found["sharded"] == found["parameters"]
    assert 0 < found["measured"]["max_rel"] < 2e-5
    whole = sum(t.nbytes for t in captured.base_tensors().values())
    assert found["base"][0] == captured.identity
    assert found["base"][1] == pytest.approx(whole / 2, rel=0.01)


def check_thin(found: Any, folder: Path) -> None:
    assert found["gradients"] < 1e-6
    assert found["numbers"] == [[32, 16], [0, 16]]  # a [1, 32] and b [32, 1]
    again = peftfx.run(base(layers=1), "lora{rank=1,where=q}")
    optimizer = optimizer_of(again.module)
    pd.load_checkpoint(pd.latest(folder / "thin") or "", again, optimizer)
    assert train(again.module, optimizer, 1, shared=False) == pytest.approx(found["loss"], rel=1e-6)


def test_all_ranks_refuse_together(folder: Path) -> None:
    first, second = results(folder, "refusals")
    for name, (kind, text) in {
        "recipe": ("RanksError", "lora{rank=2,where=q|v}, rank 1 has lora{rank=3,where=q|v}"),
        "recipe, saving": (
            "RanksError",
            "lora{rank=2,where=q|v}, rank 1 has lora{rank=3,where=q|v}",
        ),
        "values": ("RanksError", "first at 'peftfx.lora.layers.0."),
        "twice": ("RanksError", "sharded already"),
        "optimizer": ("ArtifactError", "after the module was sharded"),
        "step": ("RanksError", "rank 0 has 0, rank 1 has 1"),
        "pass": ("PassError", "peftfx.distributed.gather"),
        "other recipe": (
            "ArtifactError",
            "'lora{rank=4,where=q|v}', but the program has 'lora{rank=2,where=q}'",
        ),
        "other base": ("BaseMismatchError", "other base weights: sha256 "),
        "without": ("ArtifactError", "pass optimizer="),
        "precision": ("RanksError", "captured in torch.float32"),
        "meta": ("MetaTensorError", "peftfx.load_weights"),
    }.items():
        for found in (first, second):
            assert found[name].startswith(f"{kind}: ") and text in found[name], found[name]
    assert first["one rank"].startswith("RanksError: reading the adapters failed on rank 1 of 2")
    assert second["one rank"].startswith("NonFiniteError: ")
    assert first["file"].startswith("PathError: ") and "is a file" in first["file"]
    assert second["file"].startswith("RanksError: ") and "failed on rank 0" in second["file"]
    assert first["changed"] == second["changed"] == "[]"
    assert first["latest"] == second["latest"] == str(folder / "runs" / "step-00000001")
    assert not (folder / "a").exists()


def test_a_killed_rank_leaves_the_last_checkpoint(folder: Path) -> None:
    said = json.loads((folder / "crash-0.json").read_text())
    assert said.startswith("ArtifactError: ") and not (folder / "crash-1.json").exists()
    run = folder / "run"
    assert [p.name for p in run.iterdir()] == ["step-00000001"]
    program = peftfx.run(base(), RECIPE)
    optimizer = optimizer_of(program.module)
    path = pd.latest(run)
    assert path is not None and pd.load_checkpoint(path, program, optimizer).step == 1
    pd.save_checkpoint(run, program, optimizer, step=2)
    assert pd.latest(run) == run / "step-00000002"


def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    program = peftfx.run(base(), RECIPE)
    optimizer = optimizer_of(program.module)
    before = {n: t.clone() for n, t in program.adapter_tensors("lora").items()}
    path = pd.latest(folder / "two")
    assert (
        path is not None and not list(path.rglob("*.metadata")) and len(list(path.iterdir())) == 3
    )
    for name, damage in {
        "shard-00002-model-00001-of-00001.safetensors": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        "manifest.json": lambda b: b.replace(b'"step": 3', b'"step": "3"'),
    }.items():
        copy = shutil.copytree(path, tmp_path / name)
        file = copy / name
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(CorruptFileError):
            pd.load_checkpoint(copy, program, optimizer)
    (path.parent / "step-00000009").mkdir()
    assert pd.latest(path.parent) == path
    after = program.adapter_tensors("lora")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_one_process_needs_no_group() -> None:
    program = prepared(base())
    assert pd.gather(program) is program and (pd.rank(), pd.world()) == (0, 1)
    (alone,) = pd.held(program.module)
    assert alone.parameters == sum(
        t.nbytes for t in (*program.module.parameters(), *program.module.buffers())
    )
    with pytest.raises(RanksError, match="torchrun"):
        pd.shard(peftfx.outline(program))


def test_the_example_goes_on_with_another_engine_and_launcher(tmp_path: Path) -> None:
    binaries, root = Path(sys.executable).parent, Path(__file__).parents[2]
    env = os.environ | {
        "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(captures()),
        "TMPDIR": str(tmp_path),  # where torchrun leaves a folder
    }  # fmt: skip
    script = [str(root / "examples" / "train_distributed.py"), "--folder", str(tmp_path)]
    torchrun = [str(binaries / "torchrun"), "--standalone", "--nproc-per-node", "2", *script]
    accelerate = [
        str(binaries / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", *script,
    ]  # fmt: skip
    said: list[str] = []
    for command, more in (
        (torchrun, ["--engine", "shard", "--steps", "4", "--every", "3"]),
        (accelerate, ["--engine", "ddp", "--steps", "6", "--every", "6"]),
    ):
        done = subprocess.run(
            [*command, *more], env=env | {"ACCELERATE_USE_CPU": "true"}, cwd=tmp_path,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said += re.findall(r"step \d+: loss [\d.]+", done.stdout)
    losses = [float(line.split()[-1]) for line in said]
    assert [line.split(":")[0] for line in said] == [f"step {i}" for i in (1, 2, 3, 4, 4, 5, 6)]
    assert losses[3] == pytest.approx(losses[4], abs=2e-6) and losses[-1] < losses[0]
    assert pd.latest(tmp_path) == tmp_path / "step-00000006"
    assert (tmp_path / "adapter" / "manifest.json").exists()
