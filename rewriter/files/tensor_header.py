"""What the header of a safetensors file says of its tensors, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CorruptFileError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is: file name, dtype, shape and its bytes `[begin, end)` in the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def entries(data: Any, begin: int, total: int, file: str, where: str) -> dict[str, Entry]:
    """Where each tensor is.

    Args:
        data: the header's JSON.
        begin: where its tensors begin, in bytes.
        total: the file's size.
        file: its name.
        where: what errors call it.

    Raises:
        CorruptFileError: malformed, or of a file of another size.
    """
    found: dict[str, Entry] = {}
    try:
        for name, about in data.items():
            if name != "__metadata__":
                found[name] = _entry(file, name, about, begin)
            elif any(not isinstance(v, str) for v in about.values()):
                raise ValueError("its __metadata__ are no texts")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"the header of {where} is malformed: {error!r}. Copy or save it again."
        ) from error
    end = begin
    for entry in sorted(found.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != end:
            raise CorruptFileError(f"{where}: its tensors overlap or leave gaps. Save it again.")
        end = entry.end
    if end != total:
        what = "truncated" if total < end else "longer than its header says"
        raise CorruptFileError(
            f"{where} is {what} ({total} bytes, expected {end}). Copy or save it again."
        )
    return found


def _entry(file: str, name: str, about: Any, begin: int) -> Entry:
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    first, last = about["data_offsets"]
    for number in (*shape, first, last):
        if type(number) is not int or number < 0:
            raise ValueError(f"{name!r} has {number!r} as a size")
    if about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has {', '.join(about)}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {last - first} bytes")
    return Entry(file, dtype, shape, begin + first, begin + last)
