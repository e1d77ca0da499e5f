"""Adapter artifacts: a directory with a strict `manifest.json`, one safetensors file and a card.

The manifest holds the recipe with every decision, the hashes of all tensors and of the base they
were trained on, the input spec and the certificates. Loading replays the decisions, checks every
hash, and changes nothing until everything fits. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    CorruptFileError,
    MetaTensorError,
    NonFiniteError,
    OptionError,
    PassError,
)  # fmt: skip
from ..files.directory import Folder, reading, write_directory
from ..files.files import JSON_LIMIT, parse_json, tensors_of
from ..files.files import write_tensors as tensor_file
from ..files.identity import merkle_root, tensor_digest
from ..files.ranks import agree, first, together
from ..files.sealed import checked, compare_versions, sealed, unsealed, version_of
from ..graph.sharded import has_shards, whole
from ..inputs.spec import InputSpec
from ..inputs.specfile import read_spec
from ..pipeline.passes import Pass
from ..pipeline.syntax import parse
from ..program.history import ITSELF, Plan, Record
from ..program.state import State
from ..program.trained import require_owned
from ..program.unchanged import base_digests, require_unchanged
from ..run.recheck import require_remade
from ..run.replay import only
from .card import CARD, card, is_ours

FORMAT = 2
VERSION = "0.1.0"
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_PLAN = "plan."
"""Prefix of the tensors that step `index` of the recipe decided: `plan.<index>.<name>`."""

SAVED = "as saved, "
"""Marks certificates that were measured before saving; `program.verify()` measures them again."""

_KEYS = {
    "format_version": int, "adapters": list, "recipe": list, "tensors": dict, "base": dict,
    "inputs": dict, "versions": dict,
}  # fmt: skip
_SINCE_2 = {"trained": list, "updated": list, "dtype": (str, type(None))}
"""What the user trains himself, what forwards updated, and the dtype asked of `capture`."""

_STEP_KEYS = {
    "pass": str, "adapter": (str, type(None)), "decisions": dict, "edited": list, "skipped": list,
    "certificate": str,
}  # fmt: skip


def save(
    program: State,
    directory: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    collective: bool | None = None,
) -> None:
    """Saves adapters (never the base weights) atomically, with a model card.

    Args:
        program: a program with at least one adapter, folded or not.
        directory: new, empty, or an artifact to replace.
        adapters: which ones; all by default.
        collective: all ranks of a distributed job call this, rank 0 writes, and an error on one is
            raised on all. By default where the program is sharded: what is written is complete,
            and its hashes are those of the complete tensors. False: each caller writes.

    Raises:
        PassError: there is nothing to save, or an adapter's name is unknown.
        NonFiniteError: a tensor holds NaN or infinity.
        VerifyError: a branch holds changed values that are not saved.
        ArtifactError: the directory cannot be written; what was there stays.
        RanksError: another rank failed, or ranks have different recipes.
    """
    if collective is None:
        collective = has_shards(program.module)
    if not collective:
        _write(directory, _files(program, adapters))
        return
    agree("the recipe", "; ".join(r.text for r in program.history))
    files = together("reading the adapters", lambda: _files(program, adapters))
    said = parse_json(files[MANIFEST], MANIFEST)
    agree("what ranks would save", {"base": said["base"]["root"], **said["tensors"]})
    first("writing the adapters", lambda: _write(directory, files))


def _write(directory: str | Path, files: dict[str, bytes]) -> None:
    """Writes an artifact; a card that is not of our making stays."""
    own = files if is_ours(directory) else {n: f for n, f in files.items() if n != CARD}
    write_directory(directory, own, MANIFEST)


def _files(program: State, adapters: Sequence[str] | None) -> dict[str, bytes]:
    """The files of an artifact by name."""
    names = program.adapters if adapters is None else tuple(adapters)
    if isinstance(adapters, str):
        raise PassError(f"adapters must be a list of names: save(..., adapters=[{adapters!r}]).")
    require_owned(program)
    if not program.owners:
        raise PassError("there is no adapter to save. Insert one first: run(program, 'lora').")
    require_remade(program)
    if set(names) != set(program.adapters):
        program = only(program, names)
    require_unchanged(program)
    kept = [r for r in program.history if _kept(r)]
    tensors: dict[str, Tensor] = {}
    mine = program.owned.get(ITSELF, ())
    for name in (ITSELF, *names):
        tensors.update(program.adapter_tensors(name))
    for index, record in enumerate(kept):
        tensors |= {f"{_PLAN}{index}.{n}": t for n, t in record.plan.tensors.items()}
    tensors = {n: whole(t) for n, t in tensors.items()}
    base = base_digests(program)
    updated = program.updated()
    tensors |= {n: whole(t) for n, t in updated.items()}
    dtype = program.base.dtype
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    manifest = {
        "format_version": FORMAT,
        "adapters": list(names),
        "recipe": [_step(r) for r in kept],
        "tensors": {n: tensor_digest(t) for n, t in tensors.items()},
        "base": {"root": merkle_root(base), "tensors": base},
        "inputs": program.spec_of_base().to_json(),
        "versions": {
            "peftfx": VERSION, "torch": torch.__version__, "python": platform.python_version(),
        },
        "trained": list(mine),
        "updated": list(updated),
        "dtype": None if dtype is None else str(dtype)[6:],
    }  # fmt: skip
    text = card(program, names, root=merkle_root(base)).encode()
    return {TENSORS: tensor_file(tensors), MANIFEST: sealed(manifest), CARD: text}


def _kept(record: Record) -> bool:
    return record.applied.portable


def _step(record: Record) -> dict[str, Any]:
    return {
        "pass": record.text,
        "adapter": record.adapter,
        "decisions": dict(record.plan.decisions),
        "edited": list(record.edited),
        "skipped": [list(s) for s in record.skipped],
        "certificate": record.certificate.text.removeprefix(SAVED),
    }


def require_finite(name: str, tensor: Tensor, remedy: str = "Go back to earlier values.") -> None:
    """Raises MetaTensorError or NonFiniteError unless a tensor has values, all finite."""
    if tensor.is_meta:
        raise MetaTensorError(
            f"{name} is on the meta device and has no values; load the model's weights first: "
            "peftfx.load_weights(program, directory)."
        )
    if not tensor.is_floating_point():
        return
    if tensor.itemsize == 1:  # torch adds none of 8 bits
        tensor = tensor.float()
    if math.isfinite(tensor.sum().item()):
        return  # a sum is finite only if all of its terms are, and quickly made
    places = (~torch.isfinite(tensor)).nonzero()
    if len(places):
        index = places[0].tolist()
        raise NonFiniteError(f"{name} holds NaN or infinity, first at {index}. {remedy}")


@dataclass(frozen=True)
class Artifact:
    """A read and checked artifact, not yet applied to anything."""

    adapters: tuple[str, ...]
    steps: tuple[tuple[Pass, Plan, str], ...]
    """Each pass with what it decided and the text of its certificate."""
    tensors: Mapping[str, Tensor]
    base_root: str
    base: Mapping[str, str]
    spec: InputSpec
    trained: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    """See `_SINCE_2`."""


def read(directory: str | Path) -> Artifact:
    """Reads and checks an artifact.

    Raises:
        CorruptFileError: truncated, altered, malformed, or unknown keys.
        FormatTooNewError: written by a newer version.
    """
    return reading(directory, f"a directory with a {MANIFEST}", _read)


def _read(folder: Folder) -> Artifact:
    where = str(folder.path / MANIFEST)
    data = parse_json(folder.read(MANIFEST, JSON_LIMIT), where)
    keys = _KEYS if version_of(data, FORMAT, where) == 1 else _KEYS | _SINCE_2
    manifest = unsealed(data, keys, FORMAT, where)
    compare_versions(manifest["versions"], VERSION, where)
    steps: list[tuple[Pass, Plan, str]] = []
    for index, raw in enumerate(manifest["recipe"]):
        step = checked(raw, _STEP_KEYS, f"{where}, recipe[{index}]")
        try:
            (item,) = parse(step["pass"])
        except (OptionError, ValueError) as error:
            raise CorruptFileError(f"{where}, recipe[{index}]: {error}") from error
        steps.append((item, Plan(step["decisions"]), step["certificate"]))
    base = checked(manifest["base"], {"root": str, "tensors": dict}, f"{where}, base")
    if merkle_root(base["tensors"]) != base["root"]:
        raise CorruptFileError(f"{where}: the base hashes do not add up to their root.")
    if not all(isinstance(n, str) for n in manifest["adapters"]):
        raise CorruptFileError(f"{where}: the adapters are not names.")
    try:
        spec = read_spec(manifest["inputs"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptFileError(f"{where}: the input spec is malformed ({error}).") from error
    raw = folder.read(TENSORS)
    tensors = tensors_of(raw, manifest["tensors"], str(folder.path / TENSORS))
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    steps = [
        (item, _with_tensors(plan, f"{_PLAN}{index}.", tensors), said)
        for index, (item, plan, said) in enumerate(steps)
    ]
    names = tuple(manifest["adapters"])
    trained, updated = (tuple(map(str, manifest.get(k, ()))) for k in ("trained", "updated"))
    dtype = _dtype(manifest.get("dtype"), where)
    hashes = base["root"], base["tensors"]
    return Artifact(names, tuple(steps), tensors, *hashes, spec, trained, updated, dtype)


def _dtype(name: str | None, where: str) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(dtype, torch.dtype):
        raise CorruptFileError(f"{where}: there is no dtype {name!r}.")
    return dtype


def _with_tensors(plan: Plan, prefix: str, tensors: dict[str, Tensor]) -> Plan:
    """Moves the tensors below `prefix` into the plan that decided them."""
    mine = {n: tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    return replace(plan, tensors={n.removeprefix(prefix): t for n, t in mine.items()})


def base_difference(have: Mapping[str, str], want: Mapping[str, str], where: str) -> str:
    """What an error says of base weights that are not those of an artifact."""
    return (
        f"{where} was trained on other base weights: {differing(have, want)}. "
        "Load the base it was trained on, or pass allow_base_mismatch=True (--allow-base-mismatch)."
    )


def differing(have: Mapping[str, str], want: Mapping[str, str]) -> str:
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    changed = sorted(n for n in set(want) & set(have) if want[n] != have[n])
    parts = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((changed, "differ"), (missing, "are missing"), (extra, "are new"))
        if names
    ]
    return f"of {len(want)} tensors, {'; '.join(parts)}"
