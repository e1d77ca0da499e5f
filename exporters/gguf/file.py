"""GGUF files: what their header says, checked against the file's size, and their tensors as floats.

    magic, version, counts | key, type, value ... | name, sizes, type, offset ... | aligned tensors

Sizes lie fastest first there, and in torch's order here. Nothing is looped over or allocated that
the file's bytes do not pay for. Types and their decoders are those of the package gguf.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError, CorruptFileError, FormatTooNewError
from ...rewriter.files.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_AXES = 4
_CHUNK = 2**21
"""Numbers that are decoded at a time: decoders need several times their memory."""

_LEAST = 13
"""Bytes that each key and each tensor takes at least."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
        shape: in torch's order.
        kind: the package's name of its type, such as `F16` or `Q4_K`.
        begin, size: its bytes in the file.
    """

    shape: tuple[int, ...]
    kind: str
    begin: int
    size: int


class GgufFile:
    """An open file.

    Attributes:
        where: its path, for errors.
        fields: key -> number, text, or list of them.
        tensors: name -> where it is, in the file's order.
    """

    def __init__(self, where: str, handle: BinaryIO) -> None:
        self.where, self._handle = where, handle
        cursor = _Cursor(where, handle)
        tensors, fields = cursor.start()
        self.fields: Mapping[str, Any] = cursor.fields(fields)
        self.tensors: Mapping[str, Stored] = cursor.tensors(tensors, self.fields)

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as `llama`.

        Raises:
            ArtifactError: it is not said.
        """
        return self.text(ARCHITECTURE)

    def text(self, key: str) -> str:
        """A text of the header.

        Raises:
            ArtifactError: there is none of that key.
        """
        got = self.fields.get(key)
        if isinstance(got, str):
            return got
        raise ArtifactError(f"{self.where}: {key} must be a text, and is {got!r}. Write it again.")

    def number(self, key: str, default: float) -> float:
        """A number of the header.

        Raises:
            ArtifactError: it is something else, or not finite.
        """
        got = self.fields.get(key, default)
        if isinstance(got, int | float) and math.isfinite(got):
            return got
        raise ArtifactError(f"{self.where}: {key} must be a number, and is {got!r}.")

    def tensor(self, name: str) -> Tensor:
        """A tensor in memory of its own, float16 as such and all else as float32.

        Raises:
            ArtifactError: the package has no decoder for its type.
            CorruptFileError: the file became shorter.
        """
        stored = self.tensors[name]
        data = np.fromfile(self._at(stored.begin), np.uint8, stored.size)
        if len(data) != stored.size:
            raise CorruptFileError(f"{self.where} is truncated within {name!r}.")
        if stored.kind in _FLOATS:
            return torch.from_numpy(data).view(_FLOATS[stored.kind]).view(stored.shape)
        rows = data.reshape(math.prod(stored.shape[:-1]), -1)
        values = torch.empty(len(rows), stored.shape[-1])
        step = max(1, _CHUNK // stored.shape[-1])
        try:
            for at in range(0, len(rows), step):
                values[at : at + step] = _decoded(rows[at : at + step], stored.kind)
        except NotImplementedError as error:
            raise ArtifactError(
                f"{self.where}: the package gguf cannot decode {stored.kind}, the type of "
                f"{name!r}. Use a file of another type."
            ) from error
        return values.view(stored.shape)

    def _at(self, offset: int) -> BinaryIO:
        self._handle.seek(offset)
        return self._handle


def _decoded(rows: Any, kind: str) -> Tensor:
    """Bytes `[rows, bytes of a row]` as float32 `[rows, columns]`."""
    gguf = package()
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[GgufFile]:
    """Opens a file and reads its header.

    Raises:
        ArtifactError: it cannot be read, is no GGUF file, or the package gguf is not installed
            (CorruptFileError: truncated, altered, or a name is there twice; FormatTooNewError).
    """
    with open_regular(path) as handle:
        yield GgufFile(str(path), handle)


def is_gguf(start: bytes) -> bool:
    """Whether a file that starts so is a GGUF file."""
    return start[:4] == MAGIC


def package() -> Any:
    """The package gguf.

    Raises:
        ArtifactError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ArtifactError(
            "GGUF files need the package gguf. Get it: pip install 'peftfx[gguf]'."
        ) from error


class _Cursor:
    """Reads a header from its start."""

    def __init__(self, where: str, handle: BinaryIO) -> None:
        self.where, self.handle = where, handle
        self.size = os.fstat(handle.fileno()).st_size

    def start(self) -> tuple[int, int]:
        """How many tensors and keys there are."""
        if self._bytes(4, "its first bytes") != MAGIC:
            raise ArtifactError(f"{self.where} is no GGUF file: it does not start with {MAGIC!r}.")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            if not version & 0xFFFF:
                raise ArtifactError(f"{self.where} is big-endian. Write it for this machine.")
            error = FormatTooNewError if version > VERSIONS[-1] else ArtifactError
            raise error(f"{self.where} is of GGUF version {version}; versions 2 and 3 are read.")
        tensors, keys = self._numbers("2Q", "the counts")
        if (tensors + keys) * _LEAST > self.size:
            raise CorruptFileError(
                f"{self.where} is truncated: it claims {tensors} tensors and {keys} keys, which "
                f"{self.size} bytes cannot hold."
            )
        return tensors, keys

    def fields(self, count: int) -> dict[str, Any]:
        """The values by key."""
        fields: dict[str, Any] = {}
        for index in range(count):
            key = self._string(f"key {index} of {count}")
            if key in fields:
                raise CorruptFileError(f"{self.where}: the key {key!r} is there twice.")
            fields[key] = self._value(key, self._number("I", key))
        return fields

    def tensors(self, count: int, fields: Mapping[str, Any]) -> dict[str, Stored]:
        """Where each tensor is, checked to be within the file."""
        listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for index in range(count):
            name = self._string(f"the name of tensor {index} of {count}")
            if name in listed:
                raise CorruptFileError(f"{self.where}: the tensor {name!r} is there twice.")
            axes = self._number("I", name)
            if not 0 < axes <= _AXES:
                raise CorruptFileError(f"{self.where}: {name!r} has {axes} axes; 1 to 4 are known.")
            sizes = self._numbers(f"{axes}Q", name)
            listed[name] = sizes[::-1], self._number("I", name), self._number("Q", name)
        step: Any = fields.get(ALIGNMENT, _ALIGNMENT)
        if not isinstance(step, int) or step < 1 or step & (step - 1):
            raise CorruptFileError(f"{self.where}: {ALIGNMENT}={step!r} is no power of two.")
        begin = -(-self.handle.tell() // step) * step
        tensors = {n: self._stored(n, *about, begin, step) for n, about in listed.items()}
        end = begin
        for name, stored in sorted(tensors.items(), key=lambda i: i[1].begin):
            if stored.begin < end:
                raise CorruptFileError(f"{self.where}: {name!r} overlaps another tensor.")
            end = stored.begin + stored.size
        return tensors

    def _stored(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, begin: int, step: int
    ) -> Stored:
        gguf = package()
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise ArtifactError(
                f"{self.where}: {name!r} has type {kind}, which the package gguf does not know."
            ) from error
        block, width = gguf.GGML_QUANT_SIZES[known]
        if 0 in shape or shape[-1] % block or offset % step:
            raise CorruptFileError(f"{self.where}: {name!r} {list(shape)} does not fit its blocks.")
        size = math.prod(shape) // block * width
        if begin + offset + size > self.size:
            raise CorruptFileError(
                f"{self.where} is truncated: {name!r} {list(shape)} ends at byte "
                f"{begin + offset + size} of {self.size}."
            )
        return Stored(shape, known.name, begin + offset, size)

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind != _ARRAY:
            raise CorruptFileError(f"{self.where}: {key} is of type {kind}, which there is not.")
        inner, count = self._number("I", key), self._number("Q", key)
        if inner == _STRING:
            return [self._string(key) for _ in range(count)]
        if inner not in _SCALARS:
            raise CorruptFileError(f"{self.where}: {key} is a list of type {inner}.")
        return list(self._numbers(f"{count}{_SCALARS[inner]}", key))

    def _string(self, what: str) -> str:
        data = self._bytes(self._number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{self.where}: {what} is no UTF-8 text.") from error

    def _number(self, code: str, what: str) -> Any:
        return self._numbers(code, what)[0]

    def _numbers(self, code: str, what: str) -> tuple[Any, ...]:
        count = int(code[:-1] or 1)
        size = count * struct.calcsize(f"<{code[-1]}")
        return struct.unpack(f"<{count}{code[-1]}", self._bytes(size, what))

    def _bytes(self, count: int, what: str) -> bytes:
        left = self.size - self.handle.tell()
        if count > left:
            raise CorruptFileError(
                f"{self.where} is truncated at {what}: {count} bytes are claimed, {left} are left."
            )
        return self.handle.read(count)
