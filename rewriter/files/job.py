"""Directories that take long to write: a job that is killed goes on where it was.

Files are made in a hidden folder beside the target, which becomes the target once it is complete.
A journal in it says which files are; the same job takes them over, another one starts afresh. What
the job was made of stays in the target as a record, so that the same job again has nothing to do.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CorruptFileError, PathError, SystemFailedError, refused
from .directory import require_replaceable, sync_tree
from .files import parse_json, read_file
from .leftovers import clean, make_parents, real_path, sync
from .sealed import seal_of, sealed

JOURNAL, LOCK = ".journal", ".lock"
_ATTEMPTS, _PAUSE = 20, 0.01
"""Of taking the lock: a process that is killed lets go of it a moment later."""


class Job:
    """A folder that is being filled.

    Attributes:
        folder: where files are made.
        done: file -> what was said of it when it was complete.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.done: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def file(self, name: str, size: int = 0) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
        """Makes one file, open for writing and reading; what is put into the dict beside it, strict
        JSON, is in the journal with it. Of a known size, it has its room at once: a disk that is
        too full is told before the work, and writing costs a quarter less."""
        part, said = self.folder / f"{name}.part", dict[str, Any]()
        with open(part, "w+b") as handle:
            if size and hasattr(os, "posix_fallocate"):
                _reserve(handle, size)
            yield handle, said
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(self.folder / name)
        sync(self.folder)
        self._note({"file": name, "size": (self.folder / name).stat().st_size, "said": said})
        self.done[name] = said

    def _note(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps([entry, seal_of(entry)], allow_nan=False)
        with open(self.folder / JOURNAL, "ab") as journal:
            journal.write(f"{line}\n".encode())
            journal.flush()
            os.fsync(journal.fileno())

    def take_over(self) -> bool:
        """Reads what another process left; False where it was another job, or none."""
        try:
            lines = (self.folder / JOURNAL).read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return False
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines):
            try:
                entry, seal = parse_json(line, f"line {number + 1} of {self.folder / JOURNAL}")
            except (CorruptFileError, TypeError, ValueError):
                break  # what was being written when the machine stopped, and what is behind it
            if seal_of(entry) != seal:
                break
            entries.append(entry)
        if not entries or entries[0].get("job") != self.key:
            return False
        for entry in entries[1:]:
            path = self.folder / entry["file"]
            if path.is_file() and path.stat().st_size == entry["size"]:
                self.done[entry["file"]] = entry["said"]
        keep = {*self.done, JOURNAL, LOCK}
        for path in self.folder.iterdir():
            if path.name not in keep:
                _remove(path)
        with open(self.folder / JOURNAL, "r+b") as journal:  # what is behind its last whole line
            journal.truncate(sum(len(line) + 1 for line in lines[: len(entries)]))
        return True

    def start(self) -> None:
        """Empties the folder."""
        for path in self.folder.iterdir():
            if path.name != LOCK:
                _remove(path)
        self._note({"job": self.key})
        sync(self.folder)


def _reserve(file: BinaryIO, size: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def record_of(target: str | Path, name: str) -> dict[str, Any] | None:
    """What the record of a finished job says, without its seal; None where there is none.

    Raises:
        CorruptFileError: it was altered.
    """
    path = real_path(target) / name
    if not path.is_file():
        return None
    said: Any = parse_json(read_file(path), str(path))
    seal = said.pop("sha256", None) if isinstance(said, dict) else None  # pyright: ignore
    if seal != seal_of(said):  # pyright: ignore[reportUnknownArgumentType]
        raise CorruptFileError(f"{path} was altered (its sha256 differs). Write the folder again.")
    return said  # pyright: ignore[reportUnknownVariableType]


def finished(target: str | Path, name: str, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a target that the same job has finished; None where it is still to do.

    Raises:
        PathError: the target holds something else.
    """
    real = real_path(target)
    require_replaceable(real, name)
    record = record_of(target, name)
    if record is None:
        return None
    if record.get("made_of") != json.loads(json.dumps(made_of)):
        raise PathError(
            f"{target} was made of other files, or with other options ({name} says of which); give "
            "an empty or new directory."
        )
    for left in (JOURNAL, LOCK):
        (real / left).unlink(missing_ok=True)
    return record


def hidden(target: Path) -> Path:
    """The folder in which a target's files are made."""
    return target.with_name(f".{target.name}.peftfx-job")


@contextlib.contextmanager
def job(
    target: str | Path, name: str, made_of: Mapping[str, Any], record: Callable[[Job], Any]
) -> Iterator[Job]:
    """A folder to fill, which becomes `target` when it is whole; the same job goes on after a kill.

    Args:
        target: new or empty.
        name: of the record in it.
        made_of: strict JSON of all that decides what is written; it is in the record.
        record: what else the record says, once all is done.

    Raises:
        PathError: the target holds something else.
        SystemFailedError: it cannot be written, or another process writes it. After any error but
            an interruption nothing is left.
    """
    try:
        real = real_path(target)
        make_parents(real)
        clean(real.parent)
        if finished(real, name, made_of) is not None:
            raise SystemFailedError(f"{target} was finished by another process meanwhile.")
        folder = hidden(real)
        with _alone(folder, target):
            mine = Job(folder, seal_of(json.loads(json.dumps(made_of))))
            try:
                if not mine.take_over():
                    mine.start()
                yield mine
                content = {"made_of": dict(made_of), **record(mine)}
                (folder / name).write_bytes(sealed(content))
                sync_tree(folder)
                folder.rename(real)  # over nothing or an empty directory
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            sync(real.parent)
            for left in (JOURNAL, LOCK):
                (real / left).unlink(missing_ok=True)
    except OSError as error:
        message = f"{target} cannot be written: {error.strerror or error}."
        raise refused(error, f"{message} What was there is unchanged.") from error


def _locked(lock: BinaryIO) -> bool:
    """Takes a lock, unless another process has it."""
    try:
        flock: Any = importlib.import_module("fcntl")
        flock.flock(lock, flock.LOCK_EX | flock.LOCK_NB)
    except ImportError:  # a system without; its users take care of that
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _alone(folder: Path, target: str | Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes out of it."""
    folder.mkdir(exist_ok=True)
    with open(folder / LOCK, "ab") as lock:
        if not any(_locked(lock) or time.sleep(_PAUSE) for _ in range(_ATTEMPTS)):
            raise SystemFailedError(
                f"{target} is being written by another process. Wait for it, or give another "
                "directory."
            )
        try:
            same = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
        except FileNotFoundError:
            same = False
        if not same:
            raise SystemFailedError(f"{target} was finished by another process meanwhile.")
        yield
