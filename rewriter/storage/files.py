"""Reading and writing files so that nothing is half-written, half-read or silently wrong.

A directory appears whole or not at all (temporary sibling, fsync, rename). JSON is strict, tensor
files are checked byte for byte against hashes, and every problem is a CorruptFileError.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import ArtifactError, CorruptFileError
from ..sharded import whole
from .identity import tensor_digest

JSON_LIMIT = 16 * 2**20
"""Largest JSON document that is read, in bytes."""

HEADER_LIMIT = 8 * 2**20
"""Largest safetensors header that is read, in bytes."""

DEPTH_LIMIT = 32


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = item
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, where: str, limit: int = JSON_LIMIT) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, bounded size and depth.

    Raises:
        CorruptFileError: it is not.
    """
    if len(data) > limit:
        raise CorruptFileError(f"{where} is larger than {limit} bytes.")
    depth = deepest = 0
    for char in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data):
        depth += (char in b"[{") - (char in b"]}")
        deepest = max(deepest, depth)
    if deepest > DEPTH_LIMIT:
        raise CorruptFileError(f"{where} is nested deeper than {DEPTH_LIMIT}.")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except ValueError as error:
        raise CorruptFileError(f"{where} is not valid JSON: {error}.") from error


def write_json(data: Any) -> bytes:
    """Canonical JSON: sorted keys, UTF-8, no NaN."""
    text = json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as one safetensors file."""
    whole_ones = {name: whole(t).detach() for name, t in sorted(tensors.items())}
    plain = {name: t.cpu().contiguous().clone() for name, t in whole_ones.items()}
    return safetensors.torch.save(plain)


def read_file(path: Path, limit: int | None = None) -> bytes:
    """A file's bytes.

    Raises:
        ArtifactError: it is missing or unreadable.
        CorruptFileError: it is larger than `limit`.
    """
    try:
        if limit is not None and path.stat().st_size > limit:
            raise CorruptFileError(f"{path} is larger than {limit} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error


def read_tensors(path: Path, digests: Mapping[str, str]) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold exactly the tensors of `digests`, unaltered.

    Raises:
        CorruptFileError: truncated, altered, missing or extra tensors.
    """
    data = read_file(path)
    if len(data) < 8:
        raise CorruptFileError(f"{path} is truncated ({len(data)} bytes).")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(HEADER_LIMIT, len(data) - 8):
        raise CorruptFileError(f"{path}: the header claims {size} bytes; the file is damaged.")
    parse_json(data[8 : 8 + size].rstrip(b" "), f"the header of {path}", HEADER_LIMIT)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is not a valid safetensors file: {error}.") from error
    missing, extra = sorted(set(digests) - set(tensors)), sorted(set(tensors) - set(digests))
    if missing or extra:
        what = f"lacks {missing[:3]}" if missing else f"holds unknown tensors {extra[:3]}"
        raise CorruptFileError(f"{path} {what}; it does not belong to its manifest.")
    for name, tensor in tensors.items():
        if tensor_digest(tensor) != digests[name]:
            raise CorruptFileError(f"{path}: the bytes of {name!r} were altered (sha256 differs).")
    return tensors


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _process_is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _clean(target: Path) -> None:
    """Removes what dead processes left beside `target`, and finishes an interrupted swap."""
    for stale in target.parent.glob(f".{target.name}.*"):
        match = re.fullmatch(r"\.(.*)\.(new|old)-(\d+)-[0-9a-f]+", stale.name)
        if match is None or match[1] != target.name or not _process_is_gone(int(match[3])):
            continue
        if match[2] == "old" and not target.exists():
            stale.rename(target)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def write_directory(target: str | Path, files: Mapping[str, bytes], mark: str) -> None:
    """Writes a directory atomically from the contents of its files; see `new_directory`."""
    with new_directory(target, mark) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)


@contextlib.contextmanager
def new_directory(target: str | Path, mark: str | None) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `target` if nothing fails meanwhile.

    Args:
        target: the directory; if it exists, it must be empty or hold the file `mark`, and is
            replaced only by a complete new one.
        mark: the file that shows that a directory is of our making; None: never replace one.

    Raises:
        ArtifactError: it cannot be written; what was there before is still there.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        if target.exists():
            if not target.is_dir():
                raise ArtifactError(f"{target} is a file; give a directory.")
            if any(target.iterdir()) and (mark is None or not (target / mark).exists()):
                raise ArtifactError(
                    f"{target} holds other files{f' (no {mark})' if mark else ''}; give an empty "
                    "or new directory."
                )
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        fresh = target.with_name(f".{target.name}.new-{token}")
        old = target.with_name(f".{target.name}.old-{token}")
        try:
            fresh.mkdir()
            yield fresh
            for file in fresh.iterdir():
                _sync(file)
            _sync(fresh)
            if target.exists():
                target.rename(old)
            try:
                fresh.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            _sync(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"{target} cannot be written: {error.strerror or error}. What was there is unchanged."
        ) from error


def write_file(target: str | Path, content: bytes) -> None:
    """Writes one file atomically.

    Raises:
        ArtifactError: it cannot be written; what was there is unchanged.
    """
    target = Path(target)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(fresh, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        fresh.replace(target)
    except OSError as error:
        raise ArtifactError(
            f"{target} cannot be written: {error.strerror or error}. What was there is unchanged."
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
