"""Directories and files change as one: crashes, readers beside writers, what others put there."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfx.rewriter.distributed import checkpoint
from peftfx.rewriter.errors import ArtifactError, CorruptFileError
from peftfx.rewriter.files import directory, files, leftovers

from .writers import WRITERS, program

MARK = "manifest.json"
MOMENTS = {"files": "read_manifest", "tensors": "_dcp"}
"""What is read of a training checkpoint by the time that another one takes its place."""


def write(target: Path, number: int) -> None:
    content = b"%d" % number
    directory.write_directory(target, {MARK: content, "big": content * 3000}, MARK)


def number_of(folder: directory.Folder) -> int:
    number = folder.read(MARK)
    if folder.read("big") != number * 3000:
        raise CorruptFileError("two directories are mixed")
    return int(number)


def read(target: Path) -> int:
    return directory.reading(target, "a directory", number_of)


@pytest.fixture(params=["exchange", "renames"])
def system(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that exchanges directories in one step, and one that cannot."""
    if request.param == "renames":
        monkeypatch.setattr(directory, "_renameat2", lambda: None)
    elif directory._renameat2() is None:
        pytest.skip("this system has no renameat2")
    return request.param


class Crash(BaseException):
    """The process is gone; nothing after it happens."""


def crash_after(patch: pytest.MonkeyPatch, steps: int) -> Callable[[], int]:
    """Lets the process die after some steps of what changes the disk."""
    count = 0

    def dying(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > steps:
                raise Crash
            return real(*args, **options)

        return call

    for owner, name in (
        (os, "fsync"), (os, "link"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "rename"),
        (Path, "replace"), (Path, "unlink"), (directory, "_exchange"), (directory, "fill"),
    ):  # fmt: skip
        patch.setattr(owner, name, dying(getattr(owner, name)))
    patch.setattr(leftovers.os, "getpid", lambda: 2**22 + 1)  # no process has this number
    return lambda: count


def test_every_crash_leaves_a_whole_directory(system: str, tmp_path: Path) -> None:
    target, seen, steps = tmp_path / "a", set[int](), 0
    while True:
        shutil.rmtree(target, ignore_errors=True)
        write(target, 1)
        (target / "NOTES.md").write_text("mine")
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, steps)
            try:
                write(target, 2)
                break
            except Crash:
                steps += 1
        seen.add(read(target))  # the first that comes finds a whole one
        assert (target / "NOTES.md").read_text() == "mine"
        write(target, 3)
        assert read(target) == 3 and (target / "NOTES.md").exists()
        assert os.listdir(tmp_path) == ["a"]
    assert seen == {1, 2} and steps > 12


def test_every_crash_leaves_a_whole_file(tmp_path: Path) -> None:
    target, seen, steps = tmp_path / "m.onnx", set[bytes](), 0
    while True:
        files.write_file(target, b"old")
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, steps)
            try:
                files.write_file(target, b"new")
                break
            except Crash:
                steps += 1
        seen.add(target.read_bytes())
        files.write_file(tmp_path / "other", b"")  # whatever is written next, here
        assert sorted(os.listdir(tmp_path)) == ["m.onnx", "other"]
    assert seen == {b"old", b"new"} and steps >= 4


def test_readers_beside_a_writer(system: str, tmp_path: Path) -> None:
    target, stop, last = tmp_path / "a", threading.Event(), [0]
    write(target, 0)

    def keep_writing() -> None:
        while not stop.is_set():
            last[0] += 1
            write(target, last[0])

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        before, count, until = 0, 0, time.monotonic() + 1.0
        while time.monotonic() < until or last[0] < 20:
            number = read(target)
            assert number >= before
            before, count = number, count + 1
    finally:
        stop.set()
        thread.join()
    assert count > 20 and read(target) == last[0]
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers(tmp_path: Path) -> None:
    if directory._renameat2() is None:
        pytest.skip("this system has no renameat2")
    target, errors = tmp_path / "a", list[Exception]()

    def work(start: int) -> None:
        try:
            for number in range(start, start + 20):
                write(target, number)
        except ArtifactError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in (100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and read(target) in (119, 219)
    assert os.listdir(tmp_path) == ["a"]


def test_what_others_put_there_stays(system: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    write(target, 1)
    (target / "NOTES.md").write_text("mine")
    (target / "runs" / "one").mkdir(parents=True)
    (target / "runs" / "one" / "log").write_text("loss")
    (target / "link").symlink_to("NOTES.md")
    (target / "model-3.safetensors").write_text("a shard of before")
    with directory.new_directory(target, MARK, lambda n: n.endswith(".safetensors")) as fresh:
        (fresh / MARK).write_bytes(b"2")
        (fresh / "big").write_bytes(b"2" * 3000)
        (target / "late.txt").write_text("while it was saved")
    assert read(target) == 2
    assert sorted(os.listdir(target)) == ["NOTES.md", "big", "late.txt", "link", MARK, "runs"]
    assert (target / "runs" / "one" / "log").read_text() == "loss"
    assert os.readlink(target / "link") == "NOTES.md"


@pytest.mark.parametrize("name", ["a[1]*?", "äé 😀", "-rf", "a.new-1-00000000", "x" * 200])
def test_names_of_targets(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    left = leftovers.temporary(target, "new").with_name(f".{name}.peftfx-new-4194305-{'0' * 8}")
    left.mkdir()
    for number in (1, 2):
        write(target, number)
    assert read(target) == 2 and os.listdir(tmp_path) == [name]


def test_links_stay_links(system: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to("disk/real")  # not there yet
    for number in (1, 2):
        write(tmp_path / "a", number)
        files.write_file(tmp_path / "a" / "f", b"x")
    assert (tmp_path / "a").is_symlink() and read(tmp_path / "disk" / "real") == 2
    (tmp_path / "g").symlink_to("disk/file")
    files.write_file(tmp_path / "g", b"x")
    assert (tmp_path / "g").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == b"x"


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    """Of live processes, of other machines, and what only looks like ours."""
    host = leftovers._host()
    other = "0" * 8 if host != "0" * 8 else "1" * 8
    names = {
        f".a.peftfx-new-{os.getpid()}-{host}00000000": False,
        f".a.peftfx-new-4194305-{other}00000000": False,
        ".a.new-thing-1": False,
        ".a.peftfx-new-4194305-xyz": False,
        f".a.peftfx-new-4194305-{host}00000000": True,
        f".b.peftfx-old-4194305-{host}00000000": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK).write_text("1")
    old = f".c.peftfx-new-4194305-{other}00000000"
    (tmp_path / old).write_text("")
    os.utime(tmp_path / old, (0, 0))
    write(tmp_path / "new", 1)
    there = {n for n, goes in names.items() if not goes}
    assert set(os.listdir(tmp_path)) == {*there, "b", "new"}  # what was moved aside is back
    assert socket.gethostname() not in "".join(names)


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_file(tmp_path / "f", b"")
        write(tmp_path / "a", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a" / MARK).stat().st_mode) == 0o640


def test_folders_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Path] = []
    for module in (leftovers, directory, files):
        monkeypatch.setattr(module, "sync", done.append)
    write(tmp_path / "x" / "y" / "a", 1)
    files.write_file(tmp_path / "x" / "f", b"")
    assert {tmp_path, tmp_path / "x", tmp_path / "x" / "y"} <= set(done)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "null"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path = tmp_path / "a\0b"
    with pytest.raises(ArtifactError, match=r"cannot be read|no path"):
        files.read_file(path)


@pytest.mark.parametrize("moment", ["files", "tensors"])
def test_training_checkpoints_beside_a_writer(
    system: str, moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process replaces the step while it is read: all of one of the two is loaded."""
    del system
    writer, read, replaced = WRITERS["save_checkpoint"], getattr(checkpoint, MOMENTS[moment]), []
    writer.write(tmp_path, 1)

    def disturbed(*args: Any) -> Any:
        found = read(*args) if moment == "files" else None
        if not replaced:
            replaced.append(True)
            values = {n: t.clone() for n, t in program().adapter_tensors("lora").items()}
            writer.write(tmp_path, 2)
            with torch.no_grad():
                for name, tensor in program().adapter_tensors("lora").items():
                    tensor.copy_(values[name])
        return found if moment == "files" else read(*args)

    monkeypatch.setattr(checkpoint, MOMENTS[moment], disturbed)
    assert writer.read(tmp_path) == 2
    assert replaced


def test_training_checkpoints_that_are_always_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    WRITERS["save_checkpoint"].write(tmp_path, 1)
    monkeypatch.setattr(directory.Folder, "replaced", lambda folder: True)
    with pytest.raises(ArtifactError, match="replaced all the time"):
        WRITERS["save_checkpoint"].read(tmp_path)
    parameters = program().trainable_parameters()
    assert all(bool((p == -1).all()) for p in parameters)


def test_pieces_are_written_as_if_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size and number, where the system takes a few bytes at a time, too."""
    pieces = [
        b"",
        bytes([7]) * 5,
        memoryview(b"abc"),
        b"",
        *(bytes([i % 251]) for i in range(1500)),
    ]
    files.fill(tmp_path / "a", pieces)
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)
    real = os.writev

    def short(handle: int, given: Any) -> int:
        whole = b"".join(given)
        return real(handle, [whole[: max(1, len(whole) // 3)]] if whole else given)

    monkeypatch.setattr(os, "writev", short)
    files.fill(tmp_path / "b", pieces)
    assert (tmp_path / "b").read_bytes() == b"".join(pieces)
    monkeypatch.delattr(os, "writev")
    files.fill(tmp_path / "c", iter(pieces))
    assert (tmp_path / "c").read_bytes() == b"".join(pieces)
    files.fill(tmp_path / "d", [])
    assert (tmp_path / "d").read_bytes() == b""
