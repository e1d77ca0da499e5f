"""Two ranks against one process: gradients, losses, checkpoints, folding, and what goes wrong."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
import peftfx.distributed as pd

from .. import models
from ..recipes import METHODS
from .job import RECIPE, base, launch, optimizer_of, prepared, train


def results(name: str, folder: Path) -> Any:
    """What both ranks of a job returned, which has to be the same."""
    found, done = launch(name, folder)
    assert [p.returncode for p in done] == [0, 0], "\n".join(p.stdout for p in done)
    assert found[0] is not None
    return found


def test_engines_train_as_one_process_does(tmp_path: Path) -> None:
    ours, theirs = results("engines", tmp_path)
    assert ours == theirs
    alone = ours.pop("alone")
    assert alone[0] - alone[-1] > 0.1
    for name, got in ours.items():
        assert got["gradients"] < 1e-6, name
        assert got["curve"] == pytest.approx(alone, rel=1e-6), name
        assert got["sharded"] == (0 if name == "ddp" else got["parameters"])
    whole, parts = ours["ddp"]["held"], ours["blocks"]["held"]
    for i, rank in enumerate(whole):
        for what in ("parameters", "gradients", "optimizer"):
            assert parts[i][what] == pytest.approx(rank[what] / 2, rel=0.01), what
        assert parts[i]["activations"] == rank["activations"] > 0


def test_every_method_shards_by_block(tmp_path: Path) -> None:
    ours, theirs = results("methods", tmp_path)
    assert ours == theirs and set(ours) == set(METHODS)
    assert {n: g for n, (g, _) in ours.items() if g > 1e-6} == {}


def test_checkpoints_fit_any_number_of_ranks(tmp_path: Path) -> None:
    captured = base()
    program = prepared(captured)
    optimizer = optimizer_of(program.module)
    curve = train(program.module, optimizer, 3, shared=False)
    pd.save_checkpoint(tmp_path / "one", program, optimizer, step=3)
    curve = train(program.module, optimizer, 2, shared=False)
    ours, theirs = results("resume", tmp_path)
    assert ours == theirs
    assert ours["from two"] == [3, 2, ours["two"]]
    assert ours["from one"][:2] == [3, 1]
    assert ours["from one"][2] == pytest.approx(curve, rel=1e-6)
    assert ours["two"] == pytest.approx(curve, rel=1e-6)
    for name in ("one", "two"):
        again = peftfx.run(captured, RECIPE)
        optimizer = optimizer_of(again.module)
        found = pd.load_checkpoint(pd.latest(tmp_path / name) or "", again, optimizer)
        assert (found.step, found.ranks) == (3, 1 if name == "one" else 2)
        assert found.extra == ({} if name == "one" else {"note": "half way"})
        if name == "two":
            loaded = peftfx.load(captured, tmp_path / "adapter").adapter_tensors("lora")
            held = again.adapter_tensors("lora")
            assert all(torch.equal(t, held[n]) for n, t in loaded.items()) and loaded
        assert train(again.module, optimizer, 2, shared=False) == pytest.approx(curve, rel=1e-6)
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.*")) for n in ("one", "two")]
    assert max(sizes) < 60_000 < sum(t.nbytes for t in captured.base_tensors().values())
    check_folding(ours["folding"], captured)
    check_thin(ours["thin"], tmp_path)


def check_folding(found: Any, captured: peftfx.Program) -> None:
    assert found["equal"] and found["tensors"] == len(captured.state_names)
    assert found["sharded"] == found["parameters"]
    assert 0 < found["measured"]["max_rel"] < 2e-5
    assert found["base"] == [captured.identity, models.VOCABULARY * 32 // 2]


def check_thin(found: Any, folder: Path) -> None:
    assert found["gradients"] < 1e-6
    assert found["numbers"] == [[32, 16], [0, 16]]  # a [1, 32] and b [32, 1]
    again = peftfx.run(base(layers=1), "lora{rank=1,where=q}")
    optimizer = optimizer_of(again.module)
    pd.load_checkpoint(pd.latest(folder / "thin") or "", again, optimizer)
    assert train(again.module, optimizer, 1, shared=False) == pytest.approx(found["loss"], rel=1e-6)


def test_all_ranks_refuse_together(tmp_path: Path) -> None:
    first, second = results("refusals", tmp_path)
    for name, (kind, text) in {
        "recipe": ("RanksError", "lora{rank=2}, rank 1 has lora{rank=3}"),
        "recipe, saving": ("RanksError", "lora{rank=2}, rank 1 has lora{rank=3}"),
        "values": ("RanksError", "first at 'peftfx.lora.layers.0."),
        "twice": ("RanksError", "sharded already"),
        "optimizer": ("ArtifactError", "after the module was sharded"),
        "step": ("RanksError", "rank 0 has 0, rank 1 has 1"),
        "pass": ("PassError", "peftfx.distributed.gather"),
        "other recipe": (
            "ArtifactError",
            "'lora{rank=4}', but the program has 'lora{rank=2,where=q}'",
        ),
        "other base": ("BaseMismatchError", "other base weights: sha256 "),
        "without": ("ArtifactError", "pass optimizer="),
    }.items():
        for found in (first, second):
            assert found[name].startswith(f"{kind}: ") and text in found[name], found[name]
    assert first["one rank"].startswith("RanksError: reading the adapters failed on rank 1 of 2")
    assert second["one rank"].startswith("NonFiniteError: ")
    assert first["file"].startswith("ArtifactError: ") and "is a file" in first["file"]
    assert second["file"].startswith("RanksError: ") and "failed on rank 0" in second["file"]
    assert first["changed"] == second["changed"] == "[]"
    assert first["latest"] == second["latest"] == str(tmp_path / "runs" / "step-00000001")
    assert not (tmp_path / "a").exists()


def test_a_killed_rank_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    found, done = launch("crash", tmp_path)
    assert done[1].returncode == -signal.SIGKILL and found[1] is None
    assert done[0].returncode == 0, done[0].stdout
    assert found[0].startswith("ArtifactError"), found
    run = tmp_path / "run"
    assert [p.name for p in run.iterdir()] == ["step-00000001"]
    program = peftfx.run(base(), RECIPE)
    optimizer = optimizer_of(program.module)
    path = pd.latest(run)
    assert path is not None and pd.load_checkpoint(path, program, optimizer).step == 1
    pd.save_checkpoint(run, program, optimizer, step=2)
    assert pd.latest(run) == run / "step-00000002"
