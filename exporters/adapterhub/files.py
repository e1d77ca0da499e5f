"""The files of one AdapterHub adapter, with the head beside it: read as parts, and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...rewriter.api import Program
from ...rewriter.errors import ArtifactError, RewriteError, nearest
from ...rewriter.files.directory import Folder, reading
from ...rewriter.files.files import JSON_LIMIT, parse_json, parse_tensors
from ...rewriter.files.torch_bin import LIMIT, parse_torch_bin, write_torch_bin
from ...rewriter.parts.parts import Hypercomplex, Part, Trained
from ...rewriter.program.sites import SublayerSite
from ...rewriter.storage.artifact import require_finite
from ...rewriter.storage.parts import Parts
from ..adapter_parts import unchanged
from .config import (
    BOTTLENECK,
    CONFIG,
    HEAD,
    HEAD_CONFIG,
    INTERFACE,
    LORA,
    PREFIX,
    PROMPT,
    SAFE,
    SAFE_HEAD,
    TENSORS,
    VERSION,
    Options,
    options_of,
)
from .embeddings import couplings, prompts
from .lora import low_rank
from .places import Places, todays
from .reading import File, bottlenecks, grouped, prefixes
from .writing import written

Reader = Callable[[Options, File, Places], list[Part]]

_READERS: Mapping[str, Reader] = {
    BOTTLENECK: lambda *of: couplings(*of) + bottlenecks(*of), LORA: low_rank, PREFIX: prefixes,
    PROMPT: prompts,
}  # fmt: skip


def read_adapterhub(program: Program, directory: str | Path) -> Parts:
    """One adapter, with the head beside it, in parts.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, not understood, or not of this
            model.
    """
    return reading(directory, f"a directory with a {CONFIG}", lambda f: _read(program, f))


def _read(program: Program, folder: Folder) -> Parts:
    where = str(folder.path / CONFIG)
    data = json_in(folder, CONFIG)
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise ArtifactError(
            f"{where}: `name` is {name!r}, and must be the adapter's. Save it again."
        )
    if folder.has(INTERFACE):
        raise ArtifactError(
            f"{folder.path / INTERFACE}: the adapter was trained through a plug-in interface, "
            "which reads other values than the library's own models do. Use it with the library."
        )
    stored = tensors_in(folder, SAFE, TENSORS)
    tensors = todays(program, stored)
    file = grouped(tensors, name, where)
    paths = {
        path.removesuffix(".attention_adapters").removesuffix(".cross_attention_adapters")
        .removesuffix(".output_adapters").removesuffix(".prefix_tuning")
        .removesuffix(".prompt_tuning")
        for kind in ("adapters", "loras", "prefix_gates", "invertible_adapters", "prompt_tunings")
        for path in file.groups.get(kind, {})
    }  # fmt: skip
    places = Places(program, paths, where)
    parts: list[Part] = []
    options = options_of(data, where)
    for one in options:
        parts += _checked(lambda one=one: _READERS[one.architecture](one, file, places), where)
    file.finish()
    again = _again(program, parts, name, stored)
    original = {} if again else {f"{_ADAPTER}{k}": t for k, t in stored.items()}
    config: dict[str, Any] = {"adapter": data}
    if folder.has(HEAD_CONFIG):
        config["head"] = json_in(folder, HEAD_CONFIG)
        head = tensors_in(folder, SAFE_HEAD, HEAD)
        parts += _head(program, head, str(folder.path / HEAD))
        original |= {f"{_HEAD}{k}": t for k, t in head.items()}
    if not parts:
        raise ArtifactError(f"{where}: the adapter holds nothing.")
    kinds = "+".join(one.architecture for one in options)
    said = f"adapterhub {data.get('version') or 'of unknown version'} {kinds}"
    return Parts(tuple(parts), said, _notes(options, parts), config, original)


def _checked(read: Callable[[], list[Part]], where: str) -> list[Part]:
    """What a reader gives; torch's own error for sizes that do not fit is one that says where."""
    try:
        return read()
    except RewriteError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"{where}: the tensors and the config do not fit together ({error}). Save the adapter "
            "again."
        ) from error


_ADAPTER, _HEAD = "adapter:", "head:"
"""What the file's own tensors are kept under."""


def _again(program: Program, parts: list[Part], name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the parts are written as the tensors that they were read from."""
    try:
        _, again = written(program, parts, name)
    except ArtifactError:
        return False
    return again.keys() == tensors.keys() and all(
        again[k].dtype == t.dtype and torch.equal(again[k], t) for k, t in tensors.items()
    )


def _notes(options: list[Options], parts: list[Part]) -> tuple[str, ...]:
    notes: list[str] = []
    factors = any(isinstance(p, Hypercomplex) for p in parts)
    if any(o.data.get("phm_layer") for o in options) and not factors:
        notes.append("came in as whole matrices: no method here has Kronecker products like these")
    if any(o.architecture == PREFIX and not o.data.get("flat") for o in options):
        notes.append("came in as the rows that its embedding and two linears make")
    if any(o.data.get("use_dora") for o in options) and any(isinstance(p, Trained) for p in parts):
        notes.append("biases came in as their magnitudes scale them there")
    return tuple(notes)


def _head(program: Program, tensors: Mapping[str, Tensor], where: str) -> list[Part]:
    """A prediction head whose tensors are parameters of the model itself."""
    base = program.base.base_tensors()
    names = base.keys() | program.tensors.aliases.keys()
    for key in tensors:
        if key not in names:
            raise ArtifactError(
                f"{where}: the head's {key!r} is no parameter of this model. Nearest: "
                f"{nearest(key, names)}. Capture a model with this head, or take {HEAD_CONFIG} out "
                "of the directory."
            )
    return [
        Trained(program.tensors.stored(key), tensor)
        for key, tensor in tensors.items()
        if base[program.tensors.stored(key)].shape != tensor.shape
        or not base[program.tensors.stored(key)].to(tensor).equal(tensor)
    ]


def json_in(folder: Folder, name: str) -> dict[str, Any]:
    """The object in a JSON file; an ArtifactError if there is none."""
    where = str(folder.path / name)
    data = parse_json(folder.read(name, JSON_LIMIT), where)
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} holds no object. Save it again.")
    return data


def tensors_in(folder: Folder, safe: str, pickled: str) -> dict[str, Tensor]:
    """The tensors of a directory, which has them as safetensors or as `torch.save` writes them."""
    name = safe if folder.has(safe) else pickled
    where = str(folder.path / name)
    tensors = (
        parse_tensors(folder.read(name), where)
        if name == safe
        else parse_torch_bin(folder.read(name, LIMIT), where)
    )
    for key, tensor in tensors.items():
        require_finite(f"{where}: {key}", tensor, "Save it again.")
    return tensors


# Writing.


def adapter_files(program: Program, parts: Parts) -> dict[str, bytes]:
    """The files of one adapter by name."""
    read = unchanged(program, parts)
    said: Mapping[str, Any] = {} if read is None else read.config
    if read is not None and "adapter" in said:
        return _as_read(program, read)
    own = [p for p in parts.parts if not isinstance(p, Trained)]
    if len(own) < len(parts.parts):
        names = [p.target for p in parts.parts if isinstance(p, Trained)]
        raise ArtifactError(
            f"{parts.source}: it trained {names[0]}, too. AdapterHub stores such heads with the "
            "class of the model, which a program does not know, and other tensors not at all. Use "
            "an adapter of their own for them (serial_adapter{norms=false}; train{where=head})."
        )
    config, tensors = written(program, own, parts.source)
    width = next((s.width for s in program.sites if isinstance(s, SublayerSite)), None)
    about = {"hidden_size": width, "model_class": "", "model_name": "", "model_type": ""}
    data = {"config": config, "name": parts.source, "version": VERSION, **about}
    return {CONFIG: json_bytes(data), TENSORS: tensors_bytes(tensors)}


def _as_read(program: Program, read: Parts) -> dict[str, bytes]:
    """An adapter that is still what its files had."""
    data = read.config["adapter"]
    tensors = _originals(read, _ADAPTER)
    if not tensors:
        own = [p for p in read.parts if not isinstance(p, Trained)]
        _, tensors = written(program, own, data["name"])
    files = {CONFIG: json_bytes(data), TENSORS: tensors_bytes(tensors)}
    if "head" in read.config:
        head = _originals(read, _HEAD)
        files |= {HEAD_CONFIG: json_bytes(read.config["head"]), HEAD: tensors_bytes(head)}
    return files


def _originals(read: Parts, prefix: str) -> dict[str, Tensor]:
    mine = ((n, t) for n, t in read.original.items() if n.startswith(prefix))
    return {n.removeprefix(prefix): t for n, t in mine}


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """A config as the library writes it."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False).encode()


def tensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Finite tensors as `torch.save` writes them: what the library reads unless told otherwise."""
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    return write_torch_bin(tensors)
