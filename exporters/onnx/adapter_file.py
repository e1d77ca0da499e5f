"""The tensors of an `.onnx_adapter` file: a FlatBuffer whose every offset is checked, and written.

    Adapter    format_version, adapter_version, model_version: int; parameters: [Parameter]
    Parameter  name: string; dims: [int64]; data_type: int; raw_data: [uint8]

as ONNX Runtime's schema has them, little-endian. A native reader would take offsets at their
word; here each place lies in the file, and the tensors together are no larger than it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...rewriter.errors import ArtifactError, CorruptFileError

MARK = b"TORT"
FORMAT = 1
"""The only version of the format."""

_DTYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""ONNX's numbers of types -> those that factors have."""

_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}

_NAMES = {
    2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
    12: "uint32", 13: "uint64", 21: "uint4", 22: "int4",
}  # fmt: skip


class _Bad(ValueError):
    """What is wrong with the bytes."""


class _Buffer:
    """The bytes of a file, of which nothing outside is read."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)

    def number(self, kind: str, at: int) -> int:
        """A number of a `struct` kind."""
        if not 0 <= at <= len(self.data) - struct.calcsize(kind):
            raise _Bad(f"an offset leads to byte {at} of {len(self.data)}")
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])

    def behind(self, at: int) -> int:
        """The place that the offset at a place leads to."""
        return at + self.number("I", at)

    def table(self, at: int, count: int) -> list[int | None]:
        """Where the first fields of a table are; None where it lacks one."""
        layout = at - self.number("i", at)
        size, inline = self.number("H", layout), self.number("H", layout + 2)
        if size < 4 or size % 2:
            raise _Bad(f"a table has {size} bytes of fields")
        offsets = [
            self.number("H", layout + 4 + 2 * i) if 6 + 2 * i <= size else 0 for i in range(count)
        ]
        if any(o >= inline for o in offsets):
            raise _Bad("a field lies outside of its table")
        return [at + o if o else None for o in offsets]

    def vector(self, at: int, width: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are."""
        start = self.behind(at)
        count = self.number("I", start)
        if count * width > len(self.data) - start - 4:
            raise _Bad(f"a list claims {count} items")
        return start + 4, count

    def piece(self, at: int) -> bytes:
        """The bytes of a string or of a list of them."""
        start, count = self.vector(at, 1)
        return bytes(self.data[start : start + count])


def parse_onnx_adapter(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors by name, in memory of their own.

    Args:
        data: of the file.
        where: its name, for errors.

    Raises:
        CorruptFileError: it is damaged. ArtifactError: it is no adapter of ONNX Runtime, of another
            version, or holds codes of a quantised one.
    """
    if data[4:8] != MARK:
        raise ArtifactError(f"{where} is no adapter of ONNX Runtime: it lacks the mark {MARK!r}.")
    tensors: dict[str, Tensor] = {}
    left = len(data)
    try:
        for name, dims, kind, raw in _parameters(_Buffer(data), where):
            if name in tensors:
                raise _Bad(f"{name!r} is there twice")
            left -= len(raw)
            if left < 0:
                raise _Bad("its tensors lie in one another")
            tensors[name] = _tensor(name, dims, kind, raw, where)
    except (_Bad, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{where} is damaged, no adapter of ONNX Runtime: {error}. Save it again."
        ) from error
    return tensors


def _parameters(buffer: _Buffer, where: str) -> Iterator[tuple[str, tuple[int, ...], int, bytes]]:
    """Name, sizes, number of the type, and bytes of each tensor."""
    version, _, _, listed = buffer.table(buffer.behind(0), 4)
    said = 0 if version is None else buffer.number("i", version)
    if said != FORMAT:
        raise ArtifactError(f"{where} is of format version {said}, and {FORMAT} is read.")
    if listed is None:
        return
    first, count = buffer.vector(listed, 4)
    for index in range(count):
        name, dims, kind, raw = buffer.table(buffer.behind(first + 4 * index), 4)
        if name is None or raw is None:
            raise _Bad(f"tensor {index} has no name or no bytes")
        start, rank = (0, 0) if dims is None else buffer.vector(dims, 8)
        sizes = tuple(buffer.number("q", start + 8 * i) for i in range(rank))
        number = 0 if kind is None else buffer.number("i", kind)
        yield buffer.piece(name).decode(), sizes, number, buffer.piece(raw)


def _tensor(name: str, sizes: tuple[int, ...], kind: int, raw: bytes, where: str) -> Tensor:
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise ArtifactError(
            f"{where}: {name} holds {_NAMES.get(kind, f'type {kind}')}, codes of a quantised "
            "adapter, which are not read. Write it without quantisation."
        )
    if min(sizes, default=0) < 0 or math.prod(sizes) * dtype.itemsize != len(raw):
        raise _Bad(f"{name!r} has {len(raw)} bytes for {list(sizes)}")
    if not raw:
        if max(sizes, default=0) > 2**31:
            raise _Bad(f"{name!r} is {list(sizes)}")
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(sizes)


# Writing.

VERSION = 1
"""Of adapters and models in the file's head; ONNX Runtime compares neither."""

_ALIGNED = 64
"""Of tensors in the file, which the runtime reads where they lie."""

_FIELDS = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
"""Of both kinds of tables: four fields of four bytes behind the offset of this layout."""


def onnx_adapter_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a file in pieces: all that describes the tensors, and their own memory.

    Args:
        tensors: by name, of float types.

    Raises:
        ArtifactError: a tensor is of a type that factors do not have, or all are too large for
            the offsets of this format.
    """
    plain = {n: tensors[n].detach().cpu().contiguous() for n in sorted(tensors)}
    head = bytearray(struct.pack("<I4s", 20, MARK))
    head += _FIELDS + struct.pack("<iiiiI", 12, FORMAT, VERSION, VERSION, 16) + _FIELDS
    layout, listed, first = 40, 52, 56 + 4 * len(plain)
    tables = [first + 20 * i for i in range(len(plain))]
    offsets = [table - (listed + 4 + 4 * i) for i, table in enumerate(tables)]
    head += struct.pack(f"<I{len(plain)}I", len(plain), *offsets) + bytes(20 * len(plain))
    for table, (name, tensor) in zip(tables, plain.items(), strict=True):
        text, rank = name.encode(), tensor.dim()
        said = len(head)
        head += struct.pack("<I", len(text)) + text + bytes(4 - len(text) % 4)
        head += bytes(-(len(head) + 4) % 8)
        sizes = len(head)
        head += struct.pack(f"<I{rank}q", rank, *tensor.shape)
        number = _number(name, tensor)
        fields = table - layout, said - table - 4, sizes - table - 8, number
        struct.pack_into("<iIIi", head, table, *fields)
    pieces: list[bytes | memoryview] = [b""]
    end = len(head)
    for table, tensor in zip(tables, plain.values(), strict=True):
        space = -(end + 4) % _ALIGNED
        size = tensor.numel() * tensor.element_size()
        if end + size >= 2**31:
            raise ArtifactError(
                "the adapter is larger than 2 GiB, and files of ONNX Runtime have no offsets for "
                "more. Choose a smaller rank, or export the model folded."
            )
        struct.pack_into("<I", head, table + 16, end + space - table - 16)
        pieces.append(bytes(space) + struct.pack("<I", size))
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        end += space + 4 + size
    pieces[0] = bytes(head)
    return pieces


def _number(name: str, tensor: Tensor) -> int:
    number = _NUMBERS.get(tensor.dtype)
    if number is None:
        raise ArtifactError(f"{name} is {tensor.dtype}, which no factor is. Save it as float.")
    return number
