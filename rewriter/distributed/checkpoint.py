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
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..api import Program
from ..errors import ArtifactError, CorruptFileError, RewriteError
from ..files.directory import Folder, new_directory, opened_whole
from ..files.ranks import agree, exchange, first, rank, together, world
from ..files.sealed import sealed
from ..graph.module import device_of
from ..graph.sharded import placed_like
from ..storage.artifact import VERSION
from ..training.controllers import Controllers
from .manifest import (
    FORMAT,
    MANIFEST,
    compare_optimizers,
    compare_programs,
    compare_tensors,
    describe,
    digest,
    kind_of,
    meta_of,
    read_manifest,
    strict,
)
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

T = TypeVar("T")
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError)
_ATTEMPTS = 20
"""How often a checkpoint is read that others replace."""

STEP = re.compile(r"step-(\d{8,})")


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
        "tensors": {n: kind_of(t) for n, t in tensors.items()}, **rest, "extra": dict(extra or {}),
        "versions": {"peftfx": VERSION, "torch": torch.__version__},
    }  # fmt: skip
    together("preparing the manifest", lambda: strict(manifest))
    agree("what is saved", manifest)
    own = {n: kind_of(t) for n, t in _random().items()}
    tensors |= _random()
    manifest["tensors"] |= {n: k for theirs in exchange(own) for n, k in theirs.items()}
    _write_shards(target, tensors, manifest)
    return target


def _write_shards(target: Path, tensors: Tensors, manifest: dict[str, Any]) -> None:
    """Each rank its shards, the first the manifest with all their hashes, then the rename."""
    with contextlib.ExitStack() as opened:
        created: list[Path] = []
        first("creating the folder", lambda: created.append(
            opened.enter_context(new_directory(target, MANIFEST, _is_shard))
        ))  # fmt: skip
        fresh = Path(exchange(str(created[0]) if created else "")[0])
        _dcp(f"{target} cannot be written", lambda api: api.save(
            _flat(tensors), no_dist=world() == 1,
            storage_writer=api.HuggingFaceStorageWriter(str(fresh), save_distributed=True),
        ))  # fmt: skip
        files = together(
            "reading back", lambda: sorted(p.name for p in fresh.glob("*.safetensors"))
        )
        agree(f"what ranks see in {target} (is it on a file system that they share?)", files)

        def finish() -> None:
            manifest["files"] = {n: digest(fresh / n) for n in files}
            (fresh / MANIFEST).write_bytes(sealed(manifest))

        first("writing the manifest", finish)
        first("renaming the folder", opened.close)


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
    here = together("reading the program", lambda: describe(program))
    agree("the program in training", here)

    def read(folder: Folder) -> tuple[dict[str, Any], Tensors, Tensors]:
        manifest = together("reading the checkpoint", lambda: read_manifest(folder))
        together("comparing", lambda: compare_programs(path, manifest, here))

        def collect() -> tuple[Tensors, Tensors]:
            return _places(path, manifest, program, optimizer, controllers)

        live, places = together("comparing", lambda: _understood(path, collect))
        _dcp(f"{path} cannot be read", lambda api: api.load(
            _flat(places), no_dist=world() == 1,
            storage_reader=api.HuggingFaceStorageReader(str(path)),
        ))  # fmt: skip
        return manifest, live, places

    manifest, live, places = _undisturbed(path, read)
    parts = {n: _below(places, n) for n in ("optimizer", "controllers", "random")}

    def put() -> None:
        if controllers is not None and manifest["controllers"] is not None:
            put_controllers(controllers, parts["controllers"], manifest["controllers"])
        if optimizer is not None and manifest["optimizer"] is not None:
            put_optimizer(program, optimizer, parts["optimizer"], manifest["optimizer"])

    _understood(path, put)
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(placed_like(places[f"program.{name}"], tensor))
    if manifest["ranks"] == world():
        _put_random(parts["random"])
    return Resumed(manifest["step"], manifest["extra"], manifest["ranks"])


def _undisturbed(path: Path, read: Callable[[Folder], T]) -> T:
    """What `read` returns, on all ranks, of one directory: it opens files by their paths, so it
    reads again where the directory was replaced meanwhile."""
    for _ in range(_ATTEMPTS):
        with contextlib.ExitStack() as stack:
            folder = together("opening the checkpoint", lambda s=stack: s.enter_context(
                opened_whole(path, f"a directory with a {MANIFEST}")
            ))  # fmt: skip
            try:
                result = read(folder)
            except RewriteError:
                if any(exchange(folder.replaced())):
                    continue
                raise
            if not any(exchange(folder.replaced())):
                return result
    raise ArtifactError(f"{path} is replaced all the time; load it when no other process saves.")


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step below a folder; None if there is none."""
    checkpoints = [p for p in Path(folder).glob("step-*") if (p / MANIFEST).is_file()]
    steps = {int(m[1]): p for p in checkpoints if (m := STEP.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors")


def _understood(path: Path, work: Callable[[], T]) -> T:
    """What `work` returns; what it cannot make sense of is damage of the checkpoint."""
    try:
        return work()
    except RewriteError:
        raise
    except _DAMAGE as error:
        raise CorruptFileError(
            f"{path} is malformed ({type(error).__name__}: {error}). Resume from another one."
        ) from error


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
    return tensors, rest


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
        compare_optimizers(path, manifest["optimizer"], optimizer_rest(program, optimizer))
    live = learnt(program)
    saved = {n: meta_of(k, f"{path}: {n}") for n, k in manifest["tensors"].items()}
    compare_tensors(path, _below(saved, "program"), live)
    places = {f"program.{n}": torch.empty_like(t, requires_grad=False) for n, t in live.items()}
    for name, tensor in _below(saved, "optimizer").items():
        places[f"optimizer.{name}"] = optimizer_place(program, name, tensor)
    device = device_of(program.module)
    for name, tensor in _below(saved, "controllers").items():
        places[f"controllers.{name}"] = torch.empty_like(tensor, device=device)
    own = {n: t for n, t in saved.items() if n in _random()}
    return live, places | {n: torch.empty_like(t, device="cpu") for n, t in own.items()}


def _below(tensors: Tensors, part: str) -> Tensors:
    prefix = f"{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _flat(tensors: Tensors) -> Tensors:
    """Views with at least one axis: slices of a safetensors file need one."""
    return {n: t.view(1) if t.dim() == 0 else t for n, t in tensors.items()}


def _random() -> Tensors:
    states = {f"random.cpu.{rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda.{rank()}"] = torch.cuda.get_rng_state()
    return states


def _put_random(states: Tensors) -> None:
    for name, state in states.items():
        put = torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state
        put(state)


def _dcp(what: str, call: Callable[[Any], Any]) -> None:
    """Calls `torch.distributed.checkpoint`, which fails on all ranks if it does on one."""
    import torch.distributed.checkpoint as api
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is one
            call(api)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{what}: {error}") from error
