"""What can go wrong in folds and merges of whole folders, typed at the command line: exit code, kind
and words; nothing half done is left, and the sources stay as they were."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx.cli import main
from peftfx.rewriter.files import job

from .merging.toys import config, three
from .models import batch, llama, randomise


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an adapter in `model`, and three models to merge in `merge`."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model: Any = llama().to(torch.bfloat16).eval()
    model.save_pretrained(root / "model" / "base", max_shard_size="20KB")
    program = randomise(peftfx.run(peftfx.capture(model, kwargs=batch()), "lora{rank=2}"), 0.05)
    peftfx.save_peft(program, root / "model" / "adapter")
    config(three(root / "merge"), "linear")
    return root


COMMANDS = {
    "fold": ["fold", "{made}/model/base", "{made}/model/adapter", "--stream", "--out", "{out}/new"],
    "fold-all": ["fold-all", "{made}/model/base", "{made}/model/adapter", "--out", "{out}"],
    "convert": ["convert", "{made}/model/adapter", "{out}/new", "--to", "hf", "--base",
                "{made}/model/base"],
    "merge": ["merge", "{made}/merge/merge.yml", "{out}/new"],
}  # fmt: skip
"""Each makes one folder in `out`."""


def run(
    name: str, made: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, kind of the error, words."""
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    code = main([w.format(made=made, out=out) for w in COMMANDS[name]] + ["--json"])
    assert before == {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    said: Any = json.loads(capsys.readouterr().out)
    said = said["adapters"][0] if "adapters" in said else said
    return code, said.get("kind", ""), said.get("error", "")


@contextlib.contextmanager
def in_use(target: Path) -> Iterator[None]:
    """As if another process was writing the folder."""
    folder = job.hidden(target)
    folder.mkdir()
    with open(folder / job.LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    (folder / job.LOCK).unlink()
    folder.rmdir()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_use(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / ("adapter" if name == "fold-all" else "new")
    with in_use(target):
        code, kind, error = run(name, made, tmp_path, capsys)
        assert (code, kind) == (5, "system") and "is being written by another process" in error
        assert not target.exists()
    assert run(name, made, tmp_path, capsys)[0] == 0 and target.is_dir()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(job.os, "fsync", full)
        code, kind, error = run(name, made, tmp_path, capsys)
    assert (code, kind) == (5, "system") and "No space left on device" in error
    assert {p.name for p in tmp_path.iterdir()} <= {"fold-all.json"}
    assert run(name, made, tmp_path, capsys)[0] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_with_something_else_in_it(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / ("adapter" if name == "fold-all" else "new")
    target.mkdir()
    (target / "mine.txt").write_text("x")
    code, kind, error = run(name, made, tmp_path, capsys)
    assert (code, kind) == (2, "usage") and "holds other files" in error
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
