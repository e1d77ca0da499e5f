"""Directories that take long to fill: a killed process leaves what it wrote, and the same job goes
on from there.

Work is done in a sibling, `.<name>.peftfx-job`, which holds what job it is of and gets the target's
name when all is there. An error removes it; a process that is killed leaves it, and the next one of
the same job takes it over, whatever it wrote since its last sync left out of account. A lock that
dies with its process keeps two apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError, RewriteError
from .files import DTYPE_NAMES, JSON_LIMIT, parse_json, read_file, write_file, write_json
from .identity import tensor_bytes
from .leftovers import clean, make_parents, real_path, sync

SYNC = 2**28
"""Bytes after which what was written is made durable, and known to a later process."""


def job_hash(about: Mapping[str, Any]) -> str:
    """What tells a job from another one: all that its result depends on, strict JSON."""
    return hashlib.sha256(write_json(dict(about))).hexdigest()


@dataclass(frozen=True)
class Job:
    """A directory that is filled.

    Attributes:
        folder: where to write; None: the target holds the finished job already.
        record: name of the file that says which job it is of.
    """

    folder: Path | None
    record: str

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        if self.folder is not None:
            write_file(self.folder / name, content)

    def write_tensors(
        self,
        name: str,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        value: Callable[[str], Tensor],
    ) -> int:
        """Writes a safetensors file tensor by tensor, from where a killed process stopped.

        Args:
            entries: what the file holds, in order.
            value: gives each tensor, when its turn comes.

        Returns:
            How many tensors were there already.

        Raises:
            ArtifactError: a value has another dtype or shape than was said.
        """
        if self.folder is None or (self.folder / name).exists():
            return len(entries)
        return _write(self.folder, name, entries, value)


@contextlib.contextmanager
def resumed_directory(target: str | Path, record: str, about: Mapping[str, Any]) -> Iterator[Job]:
    """A directory to fill, which becomes `target` if nothing fails meanwhile.

    Args:
        target: a new or empty directory, or one that the same job has filled.
        record: name of a JSON file with `about` and its hash, written last.
        about: see `job_hash`.

    Raises:
        ArtifactError: it cannot be written, holds other files, or another process writes it.
    """
    try:
        real = real_path(target)
        if _is_done(real, record, about):
            yield Job(None, record)
            return
        make_parents(real)
        clean(real.parent)
        _require_empty(real)
        folder = real.with_name(f".{real.name}.peftfx-job")
        with _locked(folder, target):
            try:
                _take_over(folder, about)
                yield Job(folder, record)
                for part in folder.glob(".part*"):
                    part.unlink()
                write_file(folder / record, write_json({**about, "job": job_hash(about)}))
                sync(folder)
                _require_empty(real)
                folder.rename(real)
                sync(real.parent)
            except (OSError, RewriteError):
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise ArtifactError(
            f"{target} cannot be written: {error.strerror or error}. Nothing of it is left; what "
            "was there is unchanged."
        ) from error


def _is_done(target: Path, record: str, about: Mapping[str, Any]) -> bool:
    if not (target / record).is_file():
        return False
    held: Any = parse_json(read_file(target / record, JSON_LIMIT), str(target / record))
    return isinstance(held, dict) and held.get("job") == job_hash(about)


def _require_empty(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; give a directory.")
    if target.exists() and any(target.iterdir()):
        raise ArtifactError(f"{target} holds other files; give an empty or new directory.")


@contextlib.contextmanager
def _locked(folder: Path, target: str | Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{target} is being written by another process. Wait for it, or give another "
                "directory."
            ) from None
        yield
    finally:
        os.close(handle)


_ABOUT = ".part-job"


def _take_over(folder: Path, about: Mapping[str, Any]) -> None:
    """Keeps what a killed process of the same job left; removes what another one did."""
    note, wanted = folder / _ABOUT, job_hash(about).encode()
    if note.exists() and note.read_bytes() == wanted:
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_file(note, wanted)


def _write(
    folder: Path,
    name: str,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    value: Callable[[str], Tensor],
) -> int:
    head, ends = _header(entries)
    part, known = folder / f".part-{name}", folder / f".part-{name}.synced"
    size = int(known.read_bytes()) if part.exists() and known.exists() else 0
    size = size if size and part.stat().st_size >= size else 0
    with open(part, "r+b" if size else "wb") as file:
        file.truncate(size)
        file.seek(size)
        if not size:
            file.write(head)
        done = size = size or len(head)
        there = sum(end <= size for end in ends.values())
        for key, end in ends.items():
            if end <= size and size > len(head):
                continue
            tensor = value(key)
            if (tensor.dtype, tuple(tensor.shape)) != entries[key]:
                raise ArtifactError(f"{name}: {key} is {tensor.dtype} {list(tensor.shape)}.")
            file.write(tensor_bytes(tensor))
            if end - done >= SYNC:
                file.flush()
                os.fsync(file.fileno())
                write_file(known, str(end).encode())
                done = end
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / name)
    known.unlink(missing_ok=True)
    sync(folder)
    return there if size > len(head) else 0


def _header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each tensor ends in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in entries.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    ends = {n: len(head) + header[n]["data_offsets"][1] for n in entries}
    return head, ends
