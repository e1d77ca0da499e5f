"""Training checkpoints of any number of ranks, resumed with any other number.

A folder of `step-00000100/` folders. Each has a strict `manifest.json` and the safetensors files of
`torch.distributed.checkpoint`, one a rank, with what training changes: adapters and whatever else
trains, optimizer, controllers, random state. The frozen base is not stored; its hash is, and a
checkpoint resumes on no other. DCP's usual `.metadata` is a pickle, so it is not written: where
each shard belongs stands in the headers of the safetensors files (its Hugging Face format).

A step's folder appears by rename when every rank has written and everything was checked, so a crash
at any moment leaves the checkpoints before usable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import ArtifactError, BaseMismatchError, CorruptFileError
from ..program import Program
from ..running.controller import Controllers
from ..sharded import placed_like
from ..storage.artifact import VERSION, checked, version_of
from ..storage.checkpoint import DTYPES
from ..storage.files import JSON_LIMIT, new_directory, parse_json, read_file, write_json
from .ranks import agree, exchange, first, rank, together, world
from .state import (
    Tensors,
    controller_leaves,
    learnt,
    optimizer_place,
    optimizer_rest,
    optimizer_tensors,
    put_controllers,
    put_optimizer,
)

FORMAT = 1
MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d{8,})")

_KEYS = {
    "format_version": int, "step": int, "ranks": int, "program": dict, "tensors": dict,
    "optimizer": (dict, type(None)), "controllers": (list, type(None)), "extra": dict,
    "files": dict, "versions": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Resumed:
    """What `load_checkpoint` found: the step, what `extra` was saved, and by how many ranks."""

    step: int
    extra: Mapping[str, Any]
    ranks: int


def save_checkpoint(
    folder: str | Path,
    program: Program,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    controllers: Controllers | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/step-<step>`; every rank calls it, or the only process.

    Args:
        folder: on a file system that all ranks see.
        program: in training; of a sharded module, `inline(module)`.
        optimizer: of the program's (sharded) parameters.
        step: optimizer steps done.
        controllers: of the program.
        extra: strict JSON to get back when resuming, such as a scheduler's state.

    Returns:
        The checkpoint's folder.

    Raises:
        RanksError: the ranks have different programs or steps, or another rank failed.
        ArtifactError: it cannot be written, or a state cannot be saved. In every case the
            checkpoints before are as they were.
    """
    target = Path(folder) / f"step-{step:08d}"
    identity = together("reading the program", lambda: describe(program))
    agree("the program in training", identity)
    agree("the step", step)

    def collect() -> tuple[Tensors, dict[str, Any]]:
        return _collect(program, optimizer, controllers)

    tensors, rest = together("reading what is saved", collect)
    manifest: dict[str, Any] = {
        "format_version": FORMAT, "step": step, "ranks": world(), "program": identity,
        "tensors": {n: _kind(t) for n, t in tensors.items()}, **rest, "extra": dict(extra or {}),
        "versions": {"peftfx": VERSION, "torch": torch.__version__},
    }  # fmt: skip
    for number, theirs in enumerate(exchange(_own(tensors))):
        manifest["tensors"] |= {n: k for n, k in theirs.items() if n.endswith(f".{number}")}
    together("preparing the manifest", lambda: _json(manifest))
    with contextlib.ExitStack() as opened:
        made: list[Path] = []
        first("creating the folder", lambda: made.append(
            opened.enter_context(new_directory(target, MANIFEST))
        ))  # fmt: skip
        fresh = Path(exchange(str(made[0]) if made else "")[0])
        _dcp(f"{target} cannot be written", lambda api: api.save(
            _flat(tensors), no_dist=world() == 1,
            storage_writer=api.HuggingFaceStorageWriter(str(fresh), save_distributed=True),
        ))  # fmt: skip
        seen = together("reading back", lambda: sorted(p.name for p in fresh.glob("*.safetensors")))
        agree(f"what ranks see in {target} (is it on a file system that they share?)", seen)

        def finish() -> None:
            manifest["files"] = {n: _digest(fresh / n) for n in seen}
            (fresh / MANIFEST).write_bytes(write_json(manifest))

        first("writing the manifest", finish)
        first("renaming the folder", opened.close)
    return target


def load_checkpoint(
    path: str | Path,
    program: Program,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    controllers: Controllers | None = None,
) -> Resumed:
    """Gives a program, its optimizer and controllers the state of a checkpoint, in place.

    Every rank calls it. The number of ranks, and what is sharded, may differ from when it was
    saved. Random state (dropout) goes on exactly where the number of ranks is the same.

    Args:
        path: a checkpoint, such as `latest(folder)`.
        program: on the same base with the same recipe; `inline(module)` of a sharded module.
        optimizer: of the same class, with the same groups; needed if one was saved.
        controllers: started; needed if some were saved.

    Raises:
        BaseMismatchError: the program has other base weights.
        ArtifactError: another recipe, other tensors, another optimizer (CorruptFileError: it is
            damaged). RanksError: another rank failed. In every case nothing was changed.
    """
    path = Path(path)
    manifest = together("reading the checkpoint", lambda: _manifest(path))
    here = together("reading the program", lambda: describe(program))
    agree("the program in training", here)
    together("comparing", lambda: _compare(path, manifest, here))

    def collect() -> tuple[Tensors, Tensors]:
        return _places(path, manifest, program, optimizer, controllers)

    live, places = together("comparing", collect)
    _dcp(f"{path} cannot be read", lambda api: api.load(
        _flat(places), no_dist=world() == 1,
        storage_reader=api.HuggingFaceStorageReader(str(path)),
    ))  # fmt: skip
    parts = {n: _below(places, n) for n in ("optimizer", "controllers", "random")}
    if controllers is not None and manifest["controllers"] is not None:
        put_controllers(controllers, parts["controllers"], manifest["controllers"])
    if optimizer is not None and manifest["optimizer"] is not None:
        put_optimizer(program, optimizer, parts["optimizer"], manifest["optimizer"])
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(placed_like(places[f"program.{name}"], tensor))
    if manifest["ranks"] == world():
        _put_random(parts["random"])
    return Resumed(manifest["step"], manifest["extra"], manifest["ranks"])


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step below a folder; None if there is none."""
    found = [p for p in Path(folder).glob("step-*") if (p / MANIFEST).is_file()]
    steps = {int(m[1]): p for p in found if (m := STEP.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


# What identifies a program.

_identities: WeakKeyDictionary[Program, str] = WeakKeyDictionary()
"""Hashes of bases, which do not change: a base is hashed once, not at every checkpoint."""


def describe(program: Program) -> dict[str, Any]:
    """What ranks have to share, and a checkpoint and the program that resumes it: base (sha256),
    recipe (text), and a sha256 of every decision; collective where the base is sharded."""
    decided = [
        [r.text, r.adapter, dict(r.plan.decisions), list(r.edited), sorted(r.plan.tensors)]
        for r in program.history
    ]
    if program.base not in _identities:
        _identities[program.base] = program.identity
    return {
        "base": _identities[program.base],
        "recipe": "; ".join(r.text for r in program.history),
        "decisions": hashlib.sha256(_json(decided)).hexdigest(),
    }


def _compare(path: Path, manifest: Mapping[str, Any], here: Mapping[str, Any]) -> None:
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


# Tensors by key, `program.<name>`, `optimizer.<parameter>.<state>`, ...


def _collect(
    program: Program, optimizer: torch.optim.Optimizer | None, controllers: Controllers | None
) -> tuple[Tensors, dict[str, Any]]:
    tensors = {f"program.{n}": t for n, t in learnt(program).items()}
    rest: dict[str, Any] = {"optimizer": None, "controllers": None}
    if optimizer is not None:
        states = optimizer_tensors(program, optimizer)
        tensors |= {f"optimizer.{n}": t for n, t in states.items()}
        rest["optimizer"] = optimizer_rest(program, optimizer)
    if controllers is not None:
        states, rest["controllers"] = controller_leaves(controllers)
        tensors |= {f"controllers.{n}": t for n, t in states.items()}
    return tensors | _random(), rest


def _places(
    path: Path,
    manifest: Mapping[str, Any],
    program: Program,
    optimizer: torch.optim.Optimizer | None,
    controllers: Controllers | None,
) -> tuple[Tensors, Tensors]:
    """What is to be overwritten, and empty tensors of the same layout to read into."""
    for name, given in (("optimizer", optimizer), ("controllers", controllers)):
        if manifest[name] is not None and given is None:
            raise ArtifactError(f"{path} holds a state of the {name}: pass {name}=.")
        if manifest[name] is None and given is not None:
            raise ArtifactError(f"{path} holds no state of the {name}; it was saved without.")
    if optimizer is not None:
        _compare_optimizers(path, manifest["optimizer"], optimizer_rest(program, optimizer))
    live = learnt(program)
    saved = {n: _meta(k, f"{path}: {n}") for n, k in manifest["tensors"].items()}
    _compare_tensors(path, _below(saved, "program"), live)
    places = {f"program.{n}": torch.empty_like(t, requires_grad=False) for n, t in live.items()}
    for name, tensor in _below(saved, "optimizer").items():
        places[f"optimizer.{name}"] = optimizer_place(program, name, tensor)
    device = program.module.device
    for name, tensor in _below(saved, "controllers").items():
        places[f"controllers.{name}"] = torch.empty_like(tensor, device=device)
    own = {n: t for n, t in saved.items() if n in _random()}
    return live, places | {n: torch.empty_like(t, device="cpu") for n, t in own.items()}


def _compare_tensors(path: Path, saved: Tensors, live: Tensors) -> None:
    for name in sorted(saved.keys() ^ live.keys()):
        where = "the checkpoint" if name in saved else "the program"
        raise ArtifactError(f"{path}: {name!r} is only in {where}. Run the same recipe.")
    for name, tensor in live.items():
        if _kind(tensor) != _kind(saved[name]):
            raise ArtifactError(
                f"{path}: {name!r} is {_kind(saved[name])}, but {_kind(tensor)} in the program."
            )


def _compare_optimizers(path: Path, saved: Any, here: Mapping[str, Any]) -> None:
    said = [(o["class"], [g["params"] for g in o["groups"]]) for o in (saved, here)]
    if said[0][0] != said[1][0]:
        raise ArtifactError(f"{path} was saved with {said[0][0]}, but this is {said[1][0]}.")
    if said[0][1] != said[1][1]:
        raise ArtifactError(
            f"{path}: the optimizer's groups hold other parameters than here. Build it in the same "
            "way, for example from controllers.param_groups(...)."
        )


def _below(tensors: Tensors, part: str) -> Tensors:
    prefix = f"{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype)[6:], list(tensor.shape)]


def _own(tensors: Tensors) -> dict[str, Any]:
    return {n: _kind(t) for n, t in tensors.items() if n.startswith("random.")}


def _meta(kind: Any, where: str) -> Tensor:
    known = {str(d)[6:]: d for d in DTYPES.values()}
    try:
        dtype, shape = kind
        return torch.empty(shape, dtype=known[dtype], device="meta")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{where}: {kind!r} is no dtype and shape.") from error


def _flat(tensors: Tensors) -> Tensors:
    """Views with at least one axis: slices of a safetensors file need one."""
    return {n: t.view(1) if t.dim() == 0 else t for n, t in tensors.items()}


def _random() -> Tensors:
    held = {f"random.cpu.{rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        held[f"random.cuda.{rank()}"] = torch.cuda.get_rng_state()
    return held


def _put_random(held: Tensors) -> None:
    for name, state in held.items():
        put = torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state
        put(state)


# Files.


def _manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest, and this rank's share of the files that it names."""
    where = str(path / MANIFEST)
    data = parse_json(read_file(path / MANIFEST, JSON_LIMIT), where)
    version_of(data, FORMAT, where)
    manifest = checked(data, _KEYS, where)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if files != sorted(manifest["files"]):
        raise CorruptFileError(f"{path} holds {files}, not {sorted(manifest['files'])}.")
    for name in files[rank() :: world()]:
        if _digest(path / name) != manifest["files"][name]:
            raise CorruptFileError(f"{path / name}: its bytes were altered (sha256 differs).")
    return manifest


def _digest(path: Path) -> str:
    return hashlib.sha256(read_file(path)).hexdigest()


def _json(item: Any) -> bytes:
    try:
        return json.dumps(item, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{error}; a checkpoint holds tensors and strict JSON.") from error


def _dcp(what: str, call: Callable[[Any], Any]) -> None:
    """Calls `torch.distributed.checkpoint`, which fails on all ranks if it does on one."""
    import torch.distributed.checkpoint as api

    try:
        call(api)
    except (api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{what}: {error}") from error
