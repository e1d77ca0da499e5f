"""Reading and writing files so that nothing is half-written, half-read or silently wrong.

A file appears whole or not at all (temporary sibling, fsync, rename, fsync of its folder). JSON is
strict, tensor files are checked byte for byte against hashes, only regular files of a bounded size
are read, and every problem is a CorruptFileError. Directories: see `directory.py`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import ArtifactError, CorruptFileError, PathError, SystemFailedError, refused
from ..graph.sharded import whole
from .identity import tensor_digest
from .leftovers import clean, real_path, sync, temporary
from .tensor_header import Entry, entries

JSON_LIMIT = 16 * 2**20
"""Largest JSON document that is read, in bytes."""

HEADER_LIMIT = 8 * 2**20
"""Largest safetensors header that is read, in bytes."""

DEPTH_LIMIT = 32

DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64",
    torch.int64: "I64",
}  # fmt: skip
"""Those that are written here, by name; files hold the last ones first."""

_ORDER = {dtype: index for index, dtype in enumerate(DTYPE_NAMES)}
_DIGITS = 40
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen = set[str]()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"duplicate key {twice!r}")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def parse_json(data: bytes, where: str, limit: int = JSON_LIMIT) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, finite numbers, bounded size, depth and digits.

    Takes time linear in the size of the data.

    Raises:
        CorruptFileError: it is not.
    """
    if len(data) > limit:
        raise CorruptFileError(f"{where} is larger than {limit} bytes.")
    plain = b"\\" not in data  # quotes then begin and end strings in turns
    bare = b"".join(data.split(b'"')[::2]) if plain else _STRING.sub(b"", data)
    brackets = bare.translate(_SQUARE, _NOT_BRACKETS)
    for _ in range(DEPTH_LIMIT):  # each round takes the innermost level
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise CorruptFileError(
            f"{where} is nested deeper than {DEPTH_LIMIT}, or its brackets do not match."
        )
    if re.search(rb"\d{%d}" % (_DIGITS + 1), bare):
        raise CorruptFileError(f"{where} holds a number of more than {_DIGITS} digits.")
    try:
        item = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
            parse_float=_finite,
        )  # fmt: skip
        if b"\\u" in data:  # halves of a surrogate pair are no text
            json.dumps(item, ensure_ascii=False).encode()
    except ValueError as error:
        raise CorruptFileError(f"{where} is not valid JSON: {error}.") from error
    return item


def write_json(data: Any) -> bytes:
    """Canonical JSON: sorted keys, UTF-8, no NaN."""
    text = json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The tensors as one safetensors file, byte for byte as its library writes it."""
    return b"".join(tensor_pieces(tensors, metadata))


def tensor_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """What `write_tensors` joins: the header, and the tensors' own memory."""
    plain = {name: whole(t).detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    if sys.byteorder != "little" or any(t.dtype not in DTYPE_NAMES for t in plain.values()):
        plain = {name: t.clone() for name, t in plain.items()}
        return [safetensors.torch.save(plain, dict(metadata) if metadata else None)]
    ordered = dict(sorted(plain.items(), key=lambda i: -_ORDER[i[1].dtype]))
    pieces = [t.reshape(-1).view(torch.uint8).numpy().data for t in ordered.values()]
    entries = {n: (t.dtype, tuple(t.shape)) for n, t in ordered.items()}
    return [tensor_head(entries, metadata), *pieces]


def tensor_head(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What stands in front of the tensors in a safetensors file: their dtypes and shapes, in the
    order in which they follow."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in entries.items():
        end = begin + math.prod(shape) * dtype.itemsize
        offsets = [begin, end]
        header[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets,
        }  # fmt: skip
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_file(
    path: str | Path, limit: int | None = None, *, folder: int | None = None, where: str = ""
) -> bytes:
    """A file's bytes.

    Args:
        path: of a regular file; nothing else is opened (a pipe would wait for ever).
        limit: its largest size, in bytes.
        folder: handle of the directory that a relative `path` is in.
        where: what errors call it, if not `path`.

    Raises:
        ArtifactError: it is missing, unreadable or no regular file.
        CorruptFileError: it is larger than `limit`.
    """
    where = where or str(path)
    with open_regular(path, folder, where) as file:
        try:
            data = file.read() if limit is None else file.read(limit + 1)
        except OSError as error:
            raise SystemFailedError(f"{where} cannot be read: {error.strerror}.") from error
    if limit is not None and len(data) > limit:
        raise CorruptFileError(f"{where} is larger than {limit} bytes.")
    return data


def open_regular(path: str | Path, folder: int | None = None, where: str = "") -> BinaryIO:
    """Opens a regular file for reading; see `read_file`.

    Raises:
        ArtifactError: it is missing, unreadable or no regular file.
    """
    where = where or str(path)
    if "\0" in str(path):
        raise PathError(f"{where!r} is no path: it holds a null character.")
    try:
        require_regular(where, os.stat(path, dir_fd=folder))
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0), dir_fd=folder)
        file = open(handle, "rb")  # noqa: SIM115 - whoever asked closes it
        with contextlib.ExitStack() as stack:
            stack.enter_context(file)
            require_regular(where, os.fstat(file.fileno()))
            stack.pop_all()
    except OSError as error:
        message = f"{where} cannot be read: {error.strerror}."
        if folder is not None and error.errno == errno.ENOENT:  # the directory is not whole
            raise ArtifactError(message) from error
        raise refused(error, message) from error
    return file


def require_regular(where: object, status: os.stat_result) -> None:
    """Raises ArtifactError for a directory, a pipe, a device or a socket."""
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
        raise PathError(f"{where} cannot be read: it is {what}, not a regular file.")


def parse_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose header must be strict JSON.

    Raises:
        CorruptFileError: it is truncated or malformed.
    """
    if len(data) < 8:
        raise CorruptFileError(f"{where} is truncated ({len(data)} bytes).")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(HEADER_LIMIT, len(data) - 8):
        raise CorruptFileError(f"{where}: the header claims {size} bytes; the file is damaged.")
    said = parse_json(data[8 : 8 + size].rstrip(b" "), f"the header of {where}", HEADER_LIMIT)
    found = entries(said, 8 + size, len(data), "", where)
    if sys.byteorder != "little":
        return dict(sorted(safetensors.torch.load(data).items()))
    memory = bytearray(data)  # writable, as tensors are
    return {name: _tensor(memory, found[name], where) for name in sorted(found)}


def _tensor(memory: bytearray, entry: Entry, where: str) -> Tensor:
    """A tensor that lies in the memory of its file."""
    try:
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.begin % entry.dtype.itemsize:
            memory, entry = memory[entry.begin : entry.end], replace(entry, begin=0)
        count = math.prod(entry.shape)
        flat = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.begin)
        return flat.view(entry.shape)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{where} is damaged: {str(error).splitlines()[0]}.") from error


def header_metadata(data: bytes, where: str) -> dict[str, str]:
    """The texts in the header of a safetensors file that `parse_tensors` has read."""
    (size,) = struct.unpack("<Q", data[:8])
    said = parse_json(data[8 : 8 + size].rstrip(b" "), f"the header of {where}", HEADER_LIMIT)
    return {str(k): str(v) for k, v in said.get("__metadata__", {}).items()}


def tensors_of(data: bytes, digests: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that must hold exactly those of `digests`, unaltered.

    Raises:
        CorruptFileError: truncated, altered, missing or extra tensors.
    """
    tensors = parse_tensors(data, where)
    missing, extra = sorted(set(digests) - set(tensors)), sorted(set(tensors) - set(digests))
    if missing or extra:
        what = f"lacks {missing[:3]}" if missing else f"holds unknown tensors {extra[:3]}"
        raise CorruptFileError(f"{where} {what}; it does not belong to its manifest.")
    for name, tensor in tensors.items():
        if tensor_digest(tensor) != digests[name]:
            raise CorruptFileError(f"{where}: the bytes of {name!r} were altered (sha256 differs).")
    return tensors


def read_tensors(path: Path, digests: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads a safetensors file; see `tensors_of`.

    Raises:
        ArtifactError: it cannot be read (CorruptFileError: see `tensors_of`).
    """
    return tensors_of(read_file(path), digests, str(path))


@contextlib.contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary sibling to write, which becomes `target` if nothing fails meanwhile.

    A link is followed, so that it stays one. The file has the permissions of any new file.

    Raises:
        ArtifactError: it cannot be written; what was there is unchanged.
    """
    try:
        real = real_path(target)
        clean(real.parent)
        fresh = temporary(real, "new")
        try:
            yield fresh
            sync(fresh)
            fresh.replace(real)
            sync(real.parent)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise refused(
            error,
            f"{target} cannot be written: {error.strerror or error}. What was there is unchanged.",
        ) from error


_AT_ONCE = 512
"""Pieces in one call; systems take 1,024."""

Content = bytes | Iterable[bytes | memoryview]
"""What a file gets: its bytes, or pieces of them."""


def write_file(target: str | Path, content: Content) -> None:
    """Writes one file atomically, in a folder that exists.

    Raises:
        ArtifactError: it cannot be written; what was there is unchanged.
    """
    with new_file(target) as fresh:
        fill(fresh, content)


def fill(path: Path, content: Content, append: bool = False) -> None:
    """Writes a file's content, or more of it; pieces are not joined before."""
    mode = "ab" if append else "wb"
    pieces: list[bytes | memoryview] = [content] if isinstance(content, bytes) else list(content)
    with open(path, mode, buffering=0) as file:
        if not hasattr(os, "writev"):
            with open(path, mode) as whole_file:
                whole_file.write(b"".join(pieces))
            return
        done = 0
        while done < len(pieces):
            wrote = os.writev(file.fileno(), pieces[done : done + _AT_ONCE])
            while done < len(pieces) and wrote >= len(pieces[done]):
                wrote -= len(pieces[done])
                done += 1
            if wrote:  # a part of a piece
                pieces[done] = memoryview(pieces[done])[wrote:]
