"""Checkpoints on disk: a directory with one safetensors file, or an index and its shards.

Only headers are read at first; tensors follow one at a time, mapped from their file or copied.
Everything that does not add up (a missing or truncated shard, an index of other files, tensors
that do not fit a program) is an error before any tensor is used.

A model may have other tensors than its files: one where they hold its pieces, or a renamed one.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import Program
from ..errors import ArtifactError, CorruptFileError, PathError, WeightsError
from ..files.files import HEADER_LIMIT, parse_json, read_file, require_regular
from ..files.tensor_header import DTYPES, Entry, entries

__all__ = ["DTYPES", "INDEX", "Checkpoint", "Entry", "Piece", "header", "header_size"]

INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Piece:
    """Where a file's tensor lies in one of the model's: shape, stride and offset of a view."""

    whole: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The view of a contiguous tensor."""
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory, by name.

    Attributes:
        directory: where they are.
        index: name of the index file, or None for a single file.
        shards: file name -> the names of its tensors in the order of their bytes.
        entries: tensor name -> where it is.
        pieces: those that lie in tensors of the model -> where.
        wholes: the tensors that these make up (without bytes; the file is that of the first).
    """

    directory: Path
    index: str | None
    shards: Mapping[str, tuple[str, ...]]
    entries: Mapping[str, Entry]
    pieces: Mapping[str, Piece] = field(default_factory=dict[str, Piece])
    wholes: Mapping[str, Entry] = field(default_factory=dict[str, Entry])

    @staticmethod
    def read(directory: str | Path) -> Checkpoint:
        """Reads the headers of a checkpoint.

        Raises:
            ArtifactError: there is none.
            CorruptFileError: a shard is missing, truncated or malformed, or the index names
                other tensors than the shards hold.
        """
        path = Path(directory)
        index, listed, files = _files(path)
        shards: dict[str, tuple[str, ...]] = {}
        entries: dict[str, Entry] = {}
        for file in files:
            in_file = header(path / file)
            for name in in_file:
                if name in entries:
                    raise CorruptFileError(f"{path}: {name!r} is in {entries[name].file}, {file}.")
            entries.update(in_file)
            shards[file] = tuple(sorted(in_file, key=lambda n: (in_file[n].begin, n)))
        wrong = [n for n, file in listed.items() if n not in entries or entries[n].file != file]
        extra = sorted(set(entries) - set(listed)) if index else []
        if wrong or extra:
            what = f"lists {wrong[0]!r}, which its file lacks" if wrong else f"lacks {extra[0]!r}"
            raise CorruptFileError(f"{path / str(index)} {what}; it belongs to other files.")
        return Checkpoint(path, index, shards, entries)

    def in_pieces(self, pieces: Mapping[str, Piece], stored: Mapping[str, Tensor]) -> Checkpoint:
        """The same files for a model whose tensors are in pieces there.

        Args:
            pieces: where all that the files hold lies in the model's tensors, as far as that is
                known; what does not fill one of them without a rest is left out.
            stored: the model's tensors, of which shapes count.
        """
        of: dict[str, list[str]] = {}
        for name, piece in pieces.items():
            if name != piece.whole and piece.shape == self.entries[name].shape:
                of.setdefault(piece.whole, []).append(name)
        wholes: dict[str, Entry] = {}
        for whole, names in of.items():
            dtypes = {self.entries[n].dtype for n in names}
            first = self.entries[names[0]]
            shape = tuple(stored[whole].shape)
            full = sum(math.prod(pieces[n].shape) for n in names) == math.prod(shape)
            if full and len(dtypes) == 1 and whole not in self.entries:
                wholes[whole] = Entry(first.file, first.dtype, shape, 0, 0)
        kept = {n: pieces[n] for whole in wholes for n in of[whole]}
        return replace(self, pieces=kept, wholes=wholes)

    def whole(self, name: str) -> str:
        """The tensor of the model that a file's tensor is, or lies in."""
        return self.pieces[name].whole if name in self.pieces else name

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """What a file has under a name of such a tensor."""
        return self.pieces[name].of(whole.contiguous()) if name in self.pieces else whole

    def _joined(self, whole: str) -> Tensor:
        """A tensor made of its pieces; the file's own where there is one, as it lies there."""
        names = [n for n, p in self.pieces.items() if p.whole == whole]
        about = self.wholes[whole]
        made = torch.empty(about.shape, dtype=about.dtype)
        first = self.pieces[names[0]]
        if len(names) == 1 and (first.shape, first.stride) == (about.shape, made.stride()):
            return self.mapped(names[0])
        for name in names:
            self.piece(name, made).copy_(self.mapped(name))
        return made

    def mapped(self, name: str) -> Tensor:
        """A tensor that lives in its file until it is touched (copied if it is not aligned, and
        where it is made of pieces)."""
        if name in self.wholes:
            return self._joined(name)
        entry = self.entries[name]
        if entry.begin % entry.dtype.itemsize or entry.begin == entry.end:
            return self.tensor(name)
        return _part(_map(self.directory / entry.file), entry)

    def all_mapped(self) -> dict[str, Tensor]:
        """All tensors, see `mapped`, by name."""
        storages = {file: _map(self.directory / file) for file in self.shards}
        tensors: dict[str, Tensor] = {}
        for name, entry in sorted(self.entries.items()):
            aligned = entry.begin % entry.dtype.itemsize == 0 and entry.begin != entry.end
            tensors[name] = _part(storages[entry.file], entry) if aligned else self.tensor(name)
        return tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        entry = self.entries[name]
        data = bytearray(entry.end - entry.begin)
        with open(self.directory / entry.file, "rb") as handle:
            handle.seek(entry.begin)
            if handle.readinto(data) != len(data):
                raise CorruptFileError(f"{self.directory / entry.file} is truncated.")
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return flat.view(entry.dtype).view(entry.shape)

    def holds(self, tensor: Tensor, name: str) -> bool:
        """Whether a tensor lives in the place of its file where `name` is; nothing is read."""
        entry = self.entries[name]
        place = tensor.storage_offset() * tensor.element_size(), tuple(tensor.shape), tensor.dtype
        if place != (entry.begin, entry.shape, entry.dtype) or not tensor.is_contiguous():
            return False
        storage: Any = tensor.untyped_storage()
        return getattr(storage, "mapped_from", None) == _key(self.directory / entry.file)

    def match(self, program: Program, strict: bool = True) -> dict[str, str]:
        """Finds every stored tensor of a program's base: canonical name -> name here.

        Args:
            program: its state names, ties, shapes and dtypes say what is wanted.
            strict: refuse tensors that the program has no place for.

        Raises:
            WeightsError: missing or unexpected tensors, other shapes or dtypes, or two tensors
                for tied weights.
        """
        base = program.base
        return self.places(base.state_names, base.aliases, base.base_tensors(), strict)

    def places(
        self,
        state_names: Iterable[str],
        aliases: Mapping[str, str],
        stored: Mapping[str, Tensor],
        strict: bool = True,
    ) -> dict[str, str]:
        """The same of a model, told by the names in its state dict, tied names -> the first names
        of their tensors, and all tensors by first name."""
        names: dict[str, list[str]] = {}
        for name in state_names:
            names.setdefault(aliases.get(name, name), []).append(name)
        known = {n: e for n, e in self.entries.items() if n not in self.pieces} | {**self.wholes}
        here = {c: [n for n in group if n in known] for c, group in names.items()}
        missing = sorted(c for c, key in here.items() if not key)
        unexpected = sorted({*known}.difference(*names.values()))
        if missing or (unexpected and strict):
            raise WeightsError(
                f"{self.directory} does not hold this model's tensors: {len(missing)} are missing"
                f"{_some(missing)}, {len(unexpected)} are unexpected{_some(unexpected)}. "
                + _advice(missing, unexpected)
            )
        for canonical, key in here.items():
            entry, want = known[key[0]], stored[canonical]
            if entry.shape != tuple(want.shape) or entry.dtype != want.dtype:
                raise WeightsError(
                    f"{key[0]!r} in {self.directory / entry.file} is {_about(entry)}, but the "
                    f"program has {str(want.dtype)[6:]}{list(want.shape)}. Capture the model with "
                    "the checkpoint's own configuration and dtype."
                )
            for other in key[1:]:
                if not torch.equal(self.mapped(key[0]), self.mapped(other)):
                    raise WeightsError(
                        f"{self.directory} holds different tensors for {key[0]!r} and {other!r}, "
                        "which this model ties. Capture it with untied weights."
                    )
        return {canonical: key[0] for canonical, key in here.items()}


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def _advice(missing: list[str], unexpected: list[str]) -> str:
    if missing and unexpected:
        return (
            "The files use other names than the model: give checkpoint_of(directory, model), or "
            "write them with model.save_pretrained(directory, save_original_format=False)."
        )
    if missing:
        return "The checkpoint is of another model, or incomplete."
    return "Capture the model class that the checkpoint is of, or pass strict=False."


def _about(entry: Entry) -> str:
    return f"{str(entry.dtype)[6:]}{list(entry.shape)}"


@functools.lru_cache(maxsize=1)  # pages of a mapped file count as memory
def _mapping(path: Path, size: int, changed: int) -> Any:
    storage: Any = torch.UntypedStorage.from_file(str(path), False, size)
    storage.mapped_from = path, size, changed  # a file that was replaced is mapped anew
    return storage


def _key(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


def _map(path: Path) -> Any:
    return _mapping(*_key(path))


def _part(storage: Any, entry: Entry) -> Tensor:
    data: Any = torch.empty(0, dtype=torch.uint8)
    data.set_(storage, entry.begin, (entry.end - entry.begin,))
    return data.view(entry.dtype).view(entry.shape)


def _files(path: Path) -> tuple[str | None, dict[str, str], list[str]]:
    """(index file, tensor -> file that the index lists, all files)."""
    if not path.is_dir():
        raise PathError(f"{path} is not a directory with safetensors files.")
    indices = sorted(p.name for p in path.glob(f"*{INDEX}"))
    single = sorted(p.name for p in path.glob("*.safetensors"))
    if "model.safetensors" in single:
        return None, {}, ["model.safetensors"]
    if len(indices) == 1:
        where = path / indices[0]
        data: Any = parse_json(read_file(where, HEADER_LIMIT), str(where), HEADER_LIMIT)
        listed: Any = data.get("weight_map") if isinstance(data, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):  # pyright: ignore[reportUnknownVariableType]
            raise CorruptFileError(f"{where} has no weight_map from tensors to files.")
        files: list[str] = sorted(set(listed.values()))  # pyright: ignore[reportUnknownArgumentType]
        for file in files:
            if Path(file).name != file:
                raise CorruptFileError(f"{where} names {file!r}, which is not a file beside it.")
        return indices[0], dict(listed), files  # pyright: ignore[reportUnknownArgumentType]
    if len(single) == 1 and not indices:
        return None, {}, single
    raise ArtifactError(
        f"{path} holds {len(single)} safetensors files and {len(indices)} indices; it needs one "
        f"file, or one *{INDEX} that lists the shards. Write it with model.save_pretrained(...)."
    )


def header_size(path: Path) -> int:
    """Length of a safetensors file's header, its 8 bytes of length included."""
    try:
        require_regular(path, path.stat())
        with open(path, "rb") as handle:
            start = handle.read(8)
    except OSError as error:
        raise CorruptFileError(f"the shard {path} is missing ({error.strerror}).") from error
    if len(start) < 8:
        raise CorruptFileError(f"{path} is truncated ({len(start)} bytes).")
    return 8 + int(struct.unpack("<Q", start)[0])


def header(path: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file is.

    Raises:
        CorruptFileError: it is missing, truncated or malformed.
    """
    begin = header_size(path)
    total = path.stat().st_size
    if begin > min(HEADER_LIMIT, total):
        raise CorruptFileError(f"{path}: the header claims {begin} bytes; the file is damaged.")
    with open(path, "rb") as handle:
        raw = handle.read(begin)[8:]
    data = parse_json(raw.rstrip(b" "), f"the header of {path}", HEADER_LIMIT)
    return entries(data, begin, total, path.name, str(path))
