"""Tensors in the files of `torch.save` (`.bin`), which hold a pickle: the one place that reads one.

Only a flat dictionary of plain tensors is taken. The pickle is read by torch's own restricted
reader (`weights_only`), which imports nothing and calls nothing but what makes tensors, from an
archive whose sizes were checked before.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, CorruptFileError
from ..graph.sharded import whole

LIMIT = 16 * 2**30
"""Largest file that is read, in bytes."""

PICKLE_LIMIT = 16 * 2**20
"""Largest pickle in it: names, shapes and dtypes."""

_SHARED = 4
"""How often tensors may have the file's bytes: tied ones have them twice."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80"
"""How files of torch before 1.6 start: the pickle of their magic number."""


_DAMAGE = (
    zipfile.BadZipFile, struct.error, ArithmeticError, EOFError, LookupError, OSError,
    RuntimeError, ValueError,
)  # fmt: skip
"""What `zipfile` raises for archives whose numbers are wrong."""


def parse_torch_bin(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote from a dictionary of them, sorted by name.

    Args:
        data: the file.
        where: its path, for errors.

    Raises:
        ArtifactError: it holds anything but plain tensors by name.
        CorruptFileError: it is no such file, damaged, or larger than it may be.
    """
    if len(data) > LIMIT:
        raise CorruptFileError(f"{where} is larger than {LIMIT} bytes.")
    _check_archive(data, where)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch then tells how to run it
        said = foreign[1] if foreign else (str(error).strip() or type(error).__name__)
        said = said.splitlines()[0]
        raise ArtifactError(
            f"{where} holds something else than tensors, or is damaged ({said}). Save the tensors "
            "alone: torch.save(dict of tensors), or safetensors."
        ) from error
    return _plain(content, len(data), where)


def _check_archive(data: bytes, where: str) -> None:
    """Raises CorruptFileError for what is no archive, packed, or claims more than it has."""
    if data.startswith(_LEGACY):
        raise ArtifactError(
            f"{where} was written by torch before 1.6. Load it with torch.load(weights_only=True) "
            "and save it again."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            broken = archive.testzip() if _stored(entries, len(data)) else ""
    except _DAMAGE as error:
        raise CorruptFileError(f"{where} is damaged, no file of torch.save: {error}.") from error
    if broken is not None:
        what = f"its record {broken} was altered" if broken else "its records claim other sizes"
        raise CorruptFileError(f"{where} is damaged: {what}.")
    pickles = [e.file_size for e in entries if e.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0] > PICKLE_LIMIT:
        raise CorruptFileError(
            f"{where} has {len(pickles)} pickles of names, where one of at most {PICKLE_LIMIT} "
            "bytes belongs."
        )


def _stored(entries: list[zipfile.ZipInfo], size: int) -> bool:
    """Whether all records have names of their own and lie in the file as they are."""
    plain = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
    names = {e.filename for e in entries}
    return plain and len(names) == len(entries) and sum(e.file_size for e in entries) <= size


def _plain(content: Any, size: int, where: str) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise ArtifactError(
            f"{where} holds a {type(content).__name__}, no dictionary of tensors. Save its "
            "state_dict()."
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in content.items():
        if not isinstance(key, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise ArtifactError(
                f"{where}: {key!r} is a {type(tensor).__name__}, no plain tensor under a name. "
                "Save the tensors alone."
            )
        tensors[key] = tensor.detach()
        if reason := _oddity(tensors[key]):
            raise ArtifactError(f"{where}: the tensor {key!r} {reason}. Save it dense.")
    if sum(t.nbytes for t in tensors.values()) > _SHARED * size:
        raise CorruptFileError(f"{where} holds views of more numbers than it has.")
    return dict(sorted(tensors.items()))


def _oddity(tensor: Tensor) -> str:
    """Why a tensor is not plain; '' if it is."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.layout}, {tensor.dtype} on {tensor.device}, not dense numbers"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "is a view that repeats its numbers"
    return ""


def write_torch_bin(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as `torch.save` writes them, each with storage of its own."""
    buffer = io.BytesIO()
    torch.save(
        {n: whole(t).detach().cpu().contiguous().clone() for n, t in tensors.items()}, buffer
    )
    return buffer.getvalue()
