"""Where commands write, looked at before a model is loaded: what would fail later fails now."""

from __future__ import annotations

import os
from pathlib import Path

from .exporters.formats import MARKS
from .rewriter.errors import OptionError, PathError, refused
from .rewriter.files.directory import require_replaceable
from .rewriter.files.leftovers import real_path, temporary


def check_directory(path: str | Path, mark: str | None) -> None:
    """A directory that is to be written.

    Args:
        path: of the new directory.
        mark: see `new_directory`.

    Raises:
        PathError: it is a file, or a directory that is not replaced.
        SystemFailedError: it cannot be made there.
    """
    real = real_path(path)
    require_replaceable(real, mark)
    _require_writable(path, real)


def check_folder(path: str | Path) -> None:
    """A folder in which others are made, new or not.

    Raises:
        PathError: it is a file, or cannot be one.
        SystemFailedError: nothing can be made there.
    """
    real = real_path(path)
    if os.path.lexists(real) and not real.is_dir():
        raise PathError(f"{path} is a file. Give the name of a folder.")
    _require_writable(path, real / "any")


def check_file(path: str | Path, *suffixes: str) -> None:
    """A file that is to be written, in a folder that exists.

    Args:
        path: of the file.
        suffixes: what its name may end in; anything, if there are none.

    Raises:
        OptionError: it ends in something else.
        PathError: it is a directory, or its folder does not exist.
        SystemFailedError: it cannot be made there.
    """
    real = real_path(path)
    if suffixes and real.suffix.lower() not in suffixes:
        raise OptionError(f"{path}: its name must end in {' or '.join(suffixes)}.")
    if os.path.isdir(real):
        raise PathError(f"{path} is a directory; give the name of a file.")
    if not os.path.isdir(real.parent):
        raise PathError(f"{path} cannot be written: the folder {real.parent} does not exist.")
    _require_writable(path, real)


def check_adapter(path: str | Path, to: str) -> None:
    """An adapter that is to be written in a format of `exporters/formats`; raises as the above."""
    if to in MARKS:
        check_directory(path, MARKS[to])
    else:
        check_file(path)


def _require_writable(path: str | Path, real: Path) -> None:
    """Tries it, under a name as long as those that writing takes: what permissions say is no answer
    for root, for long names, and on systems of files that only read, or are none."""
    folder = next((p for p in real.parents if os.path.lexists(p)), Path("/"))
    if not folder.is_dir():
        raise PathError(f"{path} cannot be written: {folder} is no folder.")
    probe = temporary(folder / max(real.relative_to(folder).parts, key=len, default=""), "new")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        message = f"{path} cannot be written in {folder}: {error.strerror}. Choose another place."
        raise refused(error, message) from error
