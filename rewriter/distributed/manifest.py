"""The manifest of a training checkpoint: which program and optimizer it is of, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..api import Program
from ..errors import ArtifactError, BaseMismatchError, CorruptFileError
from ..files.directory import Folder
from ..files.files import JSON_LIMIT, parse_json, require_regular
from ..files.nested import is_path
from ..files.ranks import rank, world
from ..files.sealed import checked, compare_versions, unsealed
from ..program.unchanged import require_unchanged
from ..storage.artifact import VERSION
from ..storage.safetensors_checkpoint import DTYPES

FORMAT = 2
MANIFEST = "manifest.json"

_KEYS = {
    "format_version": int, "step": int, "ranks": int, "program": dict, "tensors": dict,
    "optimizer": (dict, type(None)), "controllers": (list, type(None)), "extra": dict,
    "files": dict, "versions": dict,
}  # fmt: skip

_identities: WeakKeyDictionary[Program, str] = WeakKeyDictionary()
"""Hashes of bases: a base whose fingerprint is the same is not hashed again."""


def describe(program: Program) -> dict[str, Any]:
    """What ranks have to share, and a checkpoint and the program that resumes it: base (sha256),
    recipe (text), and a sha256 of every decision; collective where the base is sharded."""
    decided = [
        [r.text, r.adapter, dict(r.plan.decisions), list(r.edited), sorted(r.plan.tensors)]
        for r in program.history
    ]
    require_unchanged(program)
    if program.base not in _identities:
        _identities[program.base] = program.identity
    return {
        "base": _identities[program.base],
        "recipe": "; ".join(r.text for r in program.history),
        "decisions": hashlib.sha256(strict(decided)).hexdigest(),
    }


def compare_programs(path: Path, manifest: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises BaseMismatchError or ArtifactError unless `here` is the program that was saved."""
    saved = checked(manifest["program"], dict.fromkeys(here, str), f"{path / MANIFEST}, program")
    if saved["base"] != here["base"]:
        raise BaseMismatchError(
            f"{path} was saved on other base weights: sha256 {saved['base'][:16]}..., but the "
            f"program's are {here['base'][:16]}.... Resume on the base that it was trained on."
        )
    if saved["recipe"] != here["recipe"]:
        raise ArtifactError(
            f"{path} was saved with another recipe: {saved['recipe'] or '(none)'!r}, but the "
            f"program has {here['recipe'] or '(none)'!r}. Run the same recipe before resuming."
        )
    if saved["decisions"] != here["decisions"]:
        raise ArtifactError(
            f"{path} was saved with the same recipe, {here['recipe']!r}, but its passes decided "
            "otherwise (other data, sources or model code). Resume from the same decisions: "
            "peftfx.save the adapters before training and peftfx.load them before resuming."
        )


def compare_tensors(path: Path, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Raises ArtifactError unless the program has the tensors that were saved."""
    for name in sorted(saved.keys() ^ live.keys()):
        where = "the checkpoint" if name in saved else "the program"
        raise ArtifactError(f"{path}: {name!r} is only in {where}. Run the same recipe.")
    for name, tensor in live.items():
        if kind_of(tensor) != kind_of(saved[name]):
            raise ArtifactError(
                f"{path}: {name!r} is {kind_of(saved[name])}, but {kind_of(tensor)} in the program."
            )


def compare_optimizers(path: Path, saved: Any, here: Mapping[str, Any]) -> None:
    """Raises ArtifactError for another class, or groups of other parameters."""
    said = [(o["class"], [g["params"] for g in o["groups"]]) for o in (saved, here)]
    if said[0][0] != said[1][0]:
        raise ArtifactError(f"{path} was saved with {said[0][0]}, but this is {said[1][0]}.")
    if said[0][1] != said[1][1]:
        raise ArtifactError(
            f"{path}: the optimizer's groups hold other parameters than here. Build it in the same "
            "way, for example from controllers.param_groups(...)."
        )


def kind_of(tensor: Tensor) -> list[Any]:
    """Dtype and (complete) shape as JSON."""
    return [str(tensor.dtype)[6:], list(tensor.shape)]


def meta_of(kind: Any, where: str) -> Tensor:
    """A tensor of a dtype and shape, on the meta device."""
    known = {str(d)[6:]: d for d in DTYPES.values()}
    try:
        dtype, shape = kind
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("a size is no number")
        return torch.empty(shape, dtype=known[dtype], device="meta")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{where}: {kind!r} is no dtype and shape.") from error


def read_manifest(folder: Folder) -> dict[str, Any]:
    """Reads and checks the manifest, and this rank's share of the files that it names."""
    path = folder.path
    where = str(path / MANIFEST)
    data = parse_json(folder.read(MANIFEST, JSON_LIMIT), where)
    manifest = unsealed(data, _KEYS, FORMAT, where)
    compare_versions(manifest["versions"], VERSION, where)
    _check_parts(manifest, where)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if files != sorted(manifest["files"]):
        raise CorruptFileError(f"{path} holds {files}, not {sorted(manifest['files'])}.")
    there = sum(_size(path / n) for n in files)
    told = sum(meta_of(k, f"{where}: {n}").nbytes for n, k in manifest["tensors"].items())
    if told > there:
        raise CorruptFileError(f"{where} lists {told} bytes of tensors; the files hold {there}.")
    for name in files[rank() :: world()]:
        if digest(path / name) != manifest["files"][name]:
            raise CorruptFileError(f"{path / name}: its bytes were altered (sha256 differs).")
    return manifest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error


def digest(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    try:
        require_regular(path, path.stat())
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error


def _check_parts(manifest: Mapping[str, Any], where: str) -> None:
    """CorruptFileError unless the states are as `optimizer_rest` and `flatten` write them."""
    if manifest["optimizer"] is not None:
        keys = {"class": str, "groups": list, "state": dict}
        rest = checked(manifest["optimizer"], keys, f"{where}, optimizer")
        groups: list[Any] = rest["groups"]
        if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
            raise CorruptFileError(f"{where}: the optimizer's groups have no parameters.")
    for item in manifest["controllers"] or ():
        if not (isinstance(item, list) and len(item) == 2 and is_path(item[0])):  # pyright: ignore[reportUnknownArgumentType]
            raise CorruptFileError(f"{where}: the controllers' state is malformed.")


def strict(item: Any) -> bytes:
    """Canonical JSON. Raises ArtifactError for what is none."""
    try:
        return json.dumps(item, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{error}; a checkpoint holds tensors and strict JSON.") from error
