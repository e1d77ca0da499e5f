"""Where commands write, looked at before a model is loaded: what would fail later fails now."""

from __future__ import annotations

import os
from pathlib import Path

from .exporters.formats import MARKS
from .rewriter.errors import OptionError, PathError, SystemFailedError
from .rewriter.files.directory import require_replaceable
from .rewriter.files.leftovers import real_path


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
    there = next((p for p in real.parents if p.exists()), Path("/"))
    _require_writable(path, there)


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
    if real.is_dir():
        raise PathError(f"{path} is a directory; give the name of a file.")
    if not real.parent.is_dir():
        raise PathError(f"{path} cannot be written: the folder {real.parent} does not exist.")
    _require_writable(path, real.parent)


def check_adapter(path: str | Path, to: str) -> None:
    """An adapter that is to be written in a format of `exporters/formats`; raises as the above."""
    if to in MARKS:
        check_directory(path, MARKS[to])
    else:
        check_file(path)


def _require_writable(path: str | Path, folder: Path) -> None:
    if not folder.is_dir():
        raise PathError(f"{path} cannot be written: {folder} is no folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SystemFailedError(
            f"{path} cannot be written: no permission to write in {folder}. Choose another folder."
        )
