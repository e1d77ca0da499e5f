"""Many adapters of one base: each is what a fold of it alone is, and one that fails is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx import many
from peftfx.cli import main
from peftfx.directories import to_directory
from peftfx.drawing.heat import draw_shares
from peftfx.many import REPORT, fold_all
from peftfx.rewriter.errors import OptionError
from peftfx.rewriter.files import job
from peftfx.rewriter.storage.stream import RECORD
from peftfx.shares import share_rows

from .models import batch, llama, randomise
from .writers import WRITERS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with three adapters beside it: two of ours, one of PEFT's form."""
    root = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    model: Any = llama().to(torch.bfloat16).eval()
    model.save_pretrained(root / "base", max_shard_size="20KB")
    program = peftfx.capture(model, kwargs=batch())
    for seed, name in enumerate(("one", "two")):
        adapted = randomise(peftfx.run(program, "lora{rank=2}"), 0.05, seed)
        peftfx.save(adapted, root / name)
    adapted = randomise(peftfx.run(program, "lora{rank=3,where=linear and not head}"), 0.05, 5)
    peftfx.save_peft(adapted, root / "three")
    return root


def cached(base: Path) -> dict[str, Any]:
    """One capture for all tests."""
    return {"cache": base / "cache"}


def tree(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_each_is_what_a_fold_alone_writes(base: Path, tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    adapters = [base / n for n in names]
    done = fold_all(base / "base", adapters, tmp_path / "out", capturing=cached(base))
    assert [o.status for o in done] == ["done"] * 3
    for name in names[::2]:
        to_directory(base / "base", tmp_path / name, base / name, capturing=cached(base))
        assert tree(tmp_path / name) == tree(tmp_path / "out" / name)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert [a["status"] for a in report["adapters"]] == ["done"] * 3
    again = fold_all(base / "base", adapters, tmp_path / "out")
    assert [o.status for o in again] == ["nothing to do"] * 3
    assert [o.changed for o in again] == [o.changed for o in done]
    parts = fold_all(base / "base", adapters, tmp_path / "parts", jobs=2, capturing=cached(base))
    assert [o.status for o in parts] == ["done"] * 3
    assert all(tree(tmp_path / "parts" / n) == tree(tmp_path / "out" / n) for n in names)


def test_one_that_fails_does_not_keep_the_others(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own, copy_function=shutil.copy2)
    damaged = own / "two" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    adapters = [str(own / n) for n in ("one", "two", "none", "three")]
    out = tmp_path / "out"
    command = ["fold-all", str(own / "base"), *adapters, "--out", str(out), "--json"]
    command += ["--cache", str(base / "cache")]
    assert main(command) == 4  # that of the first: damage
    told = json.loads(capsys.readouterr().out)
    found = [(a["status"], a["kind"]) for a in told["adapters"]]
    assert found == [("done", ""), ("failed", "damage"), ("failed", "usage"), ("done", "")]
    assert sorted(p.name for p in out.iterdir()) == ["fold-all.json", "one", "three"]
    assert main(["fold-all", str(own / "base"), adapters[0], "--out", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_where_all_fail_the_report_says_why(base: Path, tmp_path: Path) -> None:
    (done,) = fold_all(base / "base", [tmp_path / "none"], tmp_path / "new" / "out")
    assert done.status == "failed" and "does not exist" in done.error
    assert "does not exist" in (tmp_path / "new" / "out" / REPORT).read_text()


def test_another_base_has_its_own_exit_code(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other: Any = llama().to(torch.bfloat16).eval()
    other.save_pretrained(tmp_path / "other")
    command = ["fold-all", str(tmp_path / "other"), str(base / "one")]
    command += ["--cache", str(base / "cache")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 3


def test_adapters_of_one_name_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two adapters are called 'one'"):
        fold_all(base / "base", [base / "one", base / "three" / ".." / "one"], tmp_path / "out")
    with pytest.raises(OptionError, match="jobs=0"):
        fold_all(base / "base", [base / "one"], tmp_path / "out", jobs=0)
    assert not list(tmp_path.iterdir())


def test_what_survives_is_shown(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fold", str(base / "base"), str(base / "three"), "--stream"]
    command += ["--cache", str(base / "cache")]
    command += ["--out", str(tmp_path / "out"), "--draw", str(tmp_path / "shares.svg")]
    assert main(command) == 0
    said = capsys.readouterr().out
    shares = json.loads((tmp_path / "out" / RECORD).read_text())["shares"]
    for kind, count, middle, least, layer, along in share_rows(shares):
        assert all(word in said for word in (kind, middle, least, along))
        mine = [w for w in shares if kind in w]
        assert int(count) == len(mine)
        worst = max(mine, key=lambda w: shares[w][1])
        assert least == f"{1 - shares[worst][1]:.1%}" and f".{layer}." in worst
    drawn = (tmp_path / "shares.svg").read_text()
    assert drawn.count("<title>layer") == 2 * len(shares) and "survives" in drawn
    draw_shares(tmp_path / "shares.png", shares)
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no signal for it")
def test_processes_end_with_a_command_that_is_killed() -> None:
    reading, writing = os.pipe()
    command = os.fork()
    if command == 0:
        parent = os.getpid()
        if os.fork() == 0:
            many._end_with(parent)  # pyright: ignore[reportPrivateUsage]
            os.write(writing, b"begun")
            time.sleep(5)
            os.write(writing, b"later")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 5) == b"begun"
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    assert os.read(reading, 5) == b""
    os.close(reading)


def test_a_killed_process_may_let_go_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(job, "_locked", lambda _: next(answers))
    with job.job(tmp_path / "x", "record.json", {}, lambda _: {}):
        pass
    assert (tmp_path / "x" / "record.json").exists() and not [*answers]


def test_what_the_kills_of_the_benchmark_write(tmp_path: Path) -> None:
    for name in ("fold_all", "fold_all, 2 jobs"):
        (tmp_path / name).mkdir()
        WRITERS[name].write(tmp_path / name, 2)
        assert WRITERS[name].read(tmp_path / name) == 2


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves nothing")
def test_a_disk_without_room_is_told_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (done,) = fold_all(base / "base", [base / "one"], tmp_path / "out", capturing=cached(base))
    assert (done.status, done.kind) == ("failed", "system") and "No space left" in done.error
    assert [p.name for p in (tmp_path / "out").iterdir()] == [REPORT]
