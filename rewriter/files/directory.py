"""Directories that change as one: readers see all of the old one or all of the new one.

A new directory is filled beside its target and exchanged with it in one step where the system can
(Linux), else by two renames, which the next reader or writer finishes if they were interrupted.
Readers hold on to one directory and start again when it was replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArtifactError, PathError, SystemFailedError, refused
from .files import Content, fill, read_file
from .leftovers import clean, make_parents, real_path, recover, sync, temporary

T = TypeVar("T")
Own = Callable[[str], bool]

_AT_FDCWD, _EXCHANGE = -100, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_BUSY = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT)
_ATTEMPTS = 50
_PAUSE = 0.01
_LATER = "load it when no other process saves."


# Reading.


class Folder:
    """An open directory; its files are those that it had, whatever its path is now.

    Attributes:
        path: what it was opened as.
    """

    def __init__(self, path: Path, handle: int | None) -> None:
        self.path, self.handle = path, handle

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's bytes; see `files.read_file`."""
        if self.handle is None:
            return read_file(self.path / name, limit)
        return read_file(name, limit, folder=self.handle, where=str(self.path / name))

    def has(self, name: str) -> bool:
        """Whether there is an entry of that name."""
        try:
            if self.handle is None:
                os.stat(self.path / name)
            else:
                os.stat(name, dir_fd=self.handle)
        except OSError:
            return False
        return True

    def replaced(self) -> bool:
        """Whether another directory is at the path by now, or none."""
        if self.handle is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except OSError:
            return True


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """Opens a directory for reading."""
    if os.open not in os.supports_dir_fd or not hasattr(os, "O_DIRECTORY"):
        yield Folder(path, None)
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Folder(path, handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened_whole(path: str | Path, what: str) -> Iterator[Folder]:
    """Opens a directory; an interrupted replacement is finished first, a running one waited for.

    Raises:
        ArtifactError: there is none; `what` says what it should be.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        for attempt in range(_ATTEMPTS):
            try:
                real = real_path(path)
                if not real.exists():
                    recover(real)
                folder = stack.enter_context(opened(path))
                break
            except FileNotFoundError as error:
                if attempt == _ATTEMPTS - 1 or not _being_replaced(path):
                    raise PathError(f"{path} is not {what}.") from error
                time.sleep(_PAUSE)
            except OSError as error:
                raise refused(error, f"{path} is not {what} ({error.strerror}).") from error
        else:
            raise SystemFailedError(f"{path} is replaced all the time; {_LATER}")
        yield folder


def reading(path: str | Path, what: str, work: Callable[[Folder], T]) -> T:
    """Reads a directory as one, although others may replace it meanwhile.

    Args:
        path: of the directory; see `opened_whole`.
        what: what it should be, for the error ("a directory with a manifest.json").
        work: reads files; it runs again where the directory was replaced before it failed.

    Raises:
        ArtifactError: there is no such directory, or what `work` raises.
    """
    for attempt in range(_ATTEMPTS):
        with opened_whole(path, what) as folder:
            try:
                return work(folder)
            except ArtifactError:
                if attempt == _ATTEMPTS - 1 or not folder.replaced():
                    raise
    raise SystemFailedError(f"{path} is replaced all the time; {_LATER}")


def _being_replaced(path: Path) -> bool:
    """Whether a sibling says that another process is about to give the directory its name."""
    with contextlib.suppress(OSError):
        real = real_path(path)
        start = f".{real.name}.peftfx-old-"
        return real.exists() or any(n.startswith(start) for n in os.listdir(real.parent))
    return False


# Writing.


def write_directory(target: str | Path, files: Mapping[str, Content], mark: str) -> None:
    """Writes a directory atomically from the contents of its files; see `new_directory`."""
    with new_directory(target, mark) as fresh:
        for name, content in files.items():
            fill(fresh / name, content)


@contextlib.contextmanager
def new_directory(
    target: str | Path, mark: str | None, own: Own = lambda name: False
) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `target` if nothing fails meanwhile.

    What others put into the directory that is replaced (notes, folders) stays in it.

    Args:
        target: the directory, or a link to it; if it exists, it must be empty or hold the file
            `mark`, and is replaced only by a complete new one.
        mark: the file that shows that a directory is of our making; None: never replace one.
        own: names of files that are ours, beside those that are written and `mark`: they go.

    Raises:
        ArtifactError: it cannot be written; what was there before is still there.
    """
    try:
        real = real_path(target)
        make_parents(real)
        clean(real.parent)
        require_replaceable(real, mark)
        fresh = temporary(real, "new")
        try:
            fresh.mkdir()
            yield fresh
            written = {*os.listdir(fresh), *([mark] if mark else [])}
            if real.exists():
                require_replaceable(real, mark)
                _carry(real, fresh, written, own)
            sync_tree(fresh)
            replaced = _swap(fresh, real)
            sync(real.parent)
            if replaced is not None:
                _rescue(replaced, real, written, own)
                shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise refused(
            error,
            f"{target} cannot be written: {error.strerror or error}. What was there is unchanged.",
        ) from error


def require_replaceable(target: Path, mark: str | None) -> None:
    """Raises PathError unless nothing is there, or what `new_directory` replaces."""
    if not os.path.exists(target):  # nor where its name is none, which writing will say
        return
    if not target.is_dir():
        raise PathError(f"{target} is a file; give a directory.")
    with contextlib.suppress(FileNotFoundError):  # another process moves it aside
        names = os.listdir(target)
        if not names or (mark is not None and mark in names):
            return
        raise PathError(
            f"{target} holds other files{f' (no {mark})' if mark else ''}; give an empty or new "
            "directory."
        )


def _foreign(folder: Path, written: Collection[str], own: Own) -> list[str]:
    return [n for n in sorted(os.listdir(folder)) if n not in written and not own(n)]


def _carry(old: Path, fresh: Path, written: Collection[str], own: Own) -> None:
    """Gives the new directory, too, what others put into the old one."""
    for name in _foreign(old, written, own):
        source, target = old / name, fresh / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True, copy_function=_link)
        else:
            _link(source, target)


def _link(source: Any, target: Any) -> None:
    """A second name for a file, or a copy where the system has no second names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _rescue(old: Path, new: Path, written: Collection[str], own: Own) -> None:
    """Moves what came into the old directory after it was carried over."""
    for name in _foreign(old, written, own):
        if not os.path.lexists(new / name):
            (old / name).rename(new / name)


def sync_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            if (file := Path(path) / name).is_file() and not file.is_symlink():
                sync(file)
        sync(Path(path))


def _swap(fresh: Path, target: Path) -> Path | None:
    """Gives `fresh` the name `target`; returns where what had it is now.

    Others may do the same at the same time: the last one stays.
    """
    for _ in range(_ATTEMPTS):
        try:
            if not target.exists():
                fresh.rename(target)  # over nothing or an empty directory
                return None
            if _exchange(fresh, target):
                return fresh
            old = temporary(target, "old")
            target.rename(old)
            try:
                fresh.rename(target)
            except OSError:
                with contextlib.suppress(OSError):
                    old.rename(target)
                raise
            return old
        except OSError as error:
            if error.errno not in _BUSY or not fresh.exists():
                raise
            time.sleep(_PAUSE)
    raise SystemFailedError(f"{target} cannot be written: other processes write it all the time.")


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one step; False where the system cannot."""
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


@functools.cache
def _renameat2() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call
