"""Temporary siblings of what is being written, and what killed processes leave of them.

A sibling is `.<name>.peftfx-<new|old>-<pid>-<host and random hex>`, so that it says whose it is:
`new` is being filled, `old` was moved aside where directories cannot be exchanged. It is a leftover
when its process is gone or, from another machine, when it is a day old.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

from ..errors import PathError

_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?:peftfx-)?(?P<kind>new|old)-(?P<pid>\d{1,9})-(?P<token>[0-9a-f]{8}|[0-9a-f]{16})",
    re.DOTALL,
)
_DAY = 24 * 3600.0


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def temporary(target: Path, kind: str) -> Path:
    """A sibling's path, used by nobody else."""
    token = f"{os.getpid()}-{_host()}{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.peftfx-{kind}-{token}")


def real_path(target: str | Path) -> Path:
    """The path behind links, which stay links.

    Raises:
        PathError: it is no path.
    """
    if "\0" in str(target):
        raise PathError(f"{str(target)!r} is no path: it holds a null character.")
    return Path(os.path.realpath(target))


def clean(folder: Path) -> None:
    """Removes leftovers from a folder; an `old` one whose target is missing gets its name back."""
    for path in _leftovers(folder):
        match = _TEMPORARY.fullmatch(path.name)
        target = path.with_name(match["name"]) if match else path
        if match and match["kind"] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def recover(target: Path) -> None:
    """Gives a directory that is missing what an interrupted swap moved aside, if there is any.

    Raises:
        OSError: there is, but its folder cannot be written.
    """
    for path in _leftovers(target.parent):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (match["name"], match["kind"]) == (target.name, "old") and not target.exists():
            path.rename(target)


def _leftovers(folder: Path) -> list[Path]:
    try:
        names = sorted(n for n in os.listdir(folder) if n.startswith("."))
    except OSError:  # its caller will say so
        return []
    return [folder / n for n in names if (m := _TEMPORARY.fullmatch(n)) and _is_left(folder / n, m)]


def _is_left(path: Path, match: re.Match[str]) -> bool:
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:  # somebody else was faster
        return False
    here = len(match["token"]) == 8 or match["token"].startswith(_host())
    return age > _DAY or (here and _process_is_gone(int(match["pid"])))


def _process_is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_parents(target: Path) -> None:
    """Creates the folders above `target`, durably."""
    missing = [p for p in target.parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)
