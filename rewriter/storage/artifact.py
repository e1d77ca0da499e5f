"""Adapter artifacts: a directory with a strict `manifest.json` and one safetensors file.

The manifest holds the recipe with every decision, the hashes of all tensors and of the base they
were trained on, the input spec and the certificates. Loading replays the decisions, checks every
hash, and changes nothing until everything fits. Nothing is ever unpickled.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.capture import capture
from ..capture.spec import InputSpec
from ..distributed.ranks import agree, first, together
from ..errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    MetaTensorError,
    NonFiniteError,
    OptionError,
    PassError,
    RewriteError,
)  # fmt: skip
from ..program import Program, Record
from ..running.passes import Pass, Plan
from ..running.pipeline import apply_plan, load_values
from ..running.syntax import parse
from ..running.verify import Certificate, check_graph
from ..sharded import has_shards, whole
from .directory import Folder, reading, write_directory
from .files import JSON_LIMIT, parse_json, tensors_of
from .files import write_tensors as tensor_file
from .identity import merkle_root, tensor_digest
from .sealed import checked, compare_versions, sealed, unsealed

FORMAT = 2
VERSION = "0.1.0"
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_PLAN = "plan."
"""Prefix of the tensors that step `index` of the recipe decided: `plan.<index>.<name>`."""

_SAVED = "as saved, "
"""Marks certificates that were measured before saving; `program.verify()` measures them again."""

_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
)  # fmt: skip; the last two are torch's

_KEYS = {
    "format_version": int, "adapters": list, "recipe": list, "tensors": dict, "base": dict,
    "inputs": dict, "versions": dict,
}  # fmt: skip
_STEP_KEYS = {
    "pass": str, "adapter": (str, type(None)), "decisions": dict, "edited": list, "skipped": list,
    "certificate": str,
}  # fmt: skip


def save(
    program: Program,
    directory: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    collective: bool | None = None,
) -> None:
    """Saves adapters (never the base weights) atomically.

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
        ArtifactError: the directory cannot be written; what was there stays.
        RanksError: another rank failed, or ranks have different recipes.
    """
    if collective is None:
        collective = has_shards(program.module)
    if not collective:
        write_directory(directory, _files(program, adapters), MANIFEST)
        return
    agree("the recipe", "; ".join(r.text for r in program.history))
    files = together("reading the adapters", lambda: _files(program, adapters))
    said = parse_json(files[MANIFEST], MANIFEST)
    agree("what ranks would save", {"base": said["base"]["root"], **said["tensors"]})
    first("writing the adapters", lambda: write_directory(directory, files, MANIFEST))


def _files(program: Program, adapters: Sequence[str] | None) -> dict[str, bytes]:
    """The files of an artifact by name."""
    names = program.adapters if adapters is None else tuple(adapters)
    if isinstance(adapters, str):
        raise PassError(f"adapters must be a list of names: save(..., adapters=[{adapters!r}]).")
    if not names:
        raise PassError("there is no adapter to save. Insert one first: run(program, 'lora').")
    if set(names) != set(program.adapters):
        program = program.only(names)
    kept = [r for r in program.history if _kept(r)]
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(program.adapter_tensors(name))
    for index, record in enumerate(kept):
        tensors |= {f"{_PLAN}{index}.{n}": t for n, t in record.plan.tensors.items()}
    tensors = {n: whole(t) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    base = {n: tensor_digest(t) for n, t in program.base.base_tensors().items()}
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
    }  # fmt: skip
    return {TENSORS: tensor_file(tensors), MANIFEST: sealed(manifest)}


def _kept(record: Record) -> bool:
    return record.applied.portable


def _step(record: Record) -> dict[str, Any]:
    return {
        "pass": record.text,
        "adapter": record.adapter,
        "decisions": dict(record.plan.decisions),
        "edited": list(record.edited),
        "skipped": [list(s) for s in record.skipped],
        "certificate": record.certificate.text.removeprefix(_SAVED),
    }


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises MetaTensorError or NonFiniteError unless a tensor has values, all finite."""
    if tensor.is_meta:
        raise MetaTensorError(
            f"{name} is on the meta device and has no values; load the model's weights first: "
            "peftfx.load_weights(program, directory)."
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise NonFiniteError(f"{name} holds NaN or infinity, first at {index}.")


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
    manifest = unsealed(data, _KEYS, FORMAT, where)
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
        spec = InputSpec.from_json(manifest["inputs"])
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
    return Artifact(names, tuple(steps), tensors, base["root"], base["tensors"], spec)


def _with_tensors(plan: Plan, prefix: str, tensors: dict[str, Tensor]) -> Plan:
    """Moves the tensors below `prefix` into the plan that decided them."""
    mine = {n: tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    return replace(plan, tensors={n.removeprefix(prefix): t for n, t in mine.items()})


def load(
    target: nn.Module | Program, directory: str | Path, *, allow_base_mismatch: bool = False
) -> Program:
    """Loads saved adapters onto a model or program.

    Args:
        target: the base model (captured with the saved input spec) or a program.
        directory: what `save` wrote.
        allow_base_mismatch: accept base weights other than those trained on; the certificates
            in the history say so from then on, also once saved again.

    Returns:
        A new program in evaluation mode if `target` is; `target` is not changed.

    Raises:
        ArtifactError: (CorruptFileError, FormatTooNewError, BaseMismatchError) nothing is loaded.
    """
    artifact = read(directory)
    program = target if isinstance(target, Program) else _capture(target, artifact.spec)
    have = {n: tensor_digest(t) for n, t in program.base.base_tensors().items()}
    note = ""
    if merkle_root(have) != artifact.base_root:
        if not allow_base_mismatch:
            raise BaseMismatchError(base_difference(have, artifact.base, str(directory)))
        note = f"; loaded on another base ({_differing(have, artifact.base)})"
    return attach(program, artifact, str(directory), note)


def attach(program: Program, artifact: Artifact, directory: str, note: str = "") -> Program:
    """Applies an artifact to a program whose base is known to be right; see `load`.

    `note` is added to the certificates: what whoever reads the history has to know.
    """
    current = program
    done: set[str] = set()
    try:
        for index, (item, plan, certificate) in enumerate(artifact.steps):
            current = apply_plan(current, item, plan, check=False)
            said = Certificate(f"{_SAVED}{certificate.removesuffix(note)}{note}")
            current.history = (
                *current.history[:-1],
                replace(current.history[-1], certificate=said),
            )
            reshaped = any(later.reshapes for later, _, _ in artifact.steps[index + 1 :])
            for name in artifact.adapters:
                mine = _tensors_of(current, name, artifact.tensors, directory, reshaped)
                load_values(current, mine, reshaped)
                done |= set(mine)
        check_graph(current)
    except ArtifactError:
        raise
    except RewriteError as error:
        raise ArtifactError(f"{directory} cannot be applied to this model: {error}") from error
    except _DAMAGE as error:
        why = f"{error!r} is not a site here" if isinstance(error, KeyError) else repr(error)
        raise CorruptFileError(
            f"{directory}: the recipe does not fit this model: {why}."
        ) from error
    left = sorted(set(artifact.tensors) - done)
    if left:
        raise CorruptFileError(f"{directory}: the tensor {left[0]!r} belongs to no adapter.")
    return current


def _tensors_of(
    program: Program, adapter: str, tensors: Mapping[str, Tensor], where: str, reshaped: bool
) -> dict[str, Tensor]:
    """An adapter's values; all must be there and fit, unless a later step reshapes them."""
    wanted = program.adapter_tensors(adapter)
    if reshaped:
        fitting = {n: t.shape for n, t in tensors.items() if n in wanted}
        return {n: tensors[n] for n, shape in fitting.items() if shape == wanted[n].shape}
    for name, tensor in wanted.items():
        given = tensors.get(name)
        if given is None:
            raise CorruptFileError(
                f"{where}: the tensor {name!r} of adapter {adapter!r} is missing."
            )
        wider = torch.promote_types(given.dtype, tensor.dtype) != tensor.dtype
        if given.shape != tensor.shape or wider:
            raise CorruptFileError(
                f"{where}: {name!r} is {tuple(given.shape)} {given.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}."
            )
    return {name: tensors[name] for name in wanted}


def _capture(model: nn.Module, spec: InputSpec) -> Program:
    example = {n: t for n, t in spec.example().items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dynamic = {
        i.name: {a: str(s) for a, s in enumerate(i.shape) if isinstance(s, str)}
        for i in spec.inputs
    }
    args, kwargs = spec.arguments({n: t.to(device) for n, t in example.items()})
    return capture(model, args, kwargs, dynamic=dynamic)


def base_difference(have: Mapping[str, str], want: Mapping[str, str], where: str) -> str:
    """What an error says of base weights that are not those of an artifact."""
    return (
        f"{where} was trained on other base weights: {_differing(have, want)}. "
        "Load the base it was trained on, or pass allow_base_mismatch=True."
    )


def _differing(have: Mapping[str, str], want: Mapping[str, str]) -> str:
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    changed = sorted(n for n in set(want) & set(have) if want[n] != have[n])
    parts = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((changed, "differ"), (missing, "are missing"), (extra, "are new"))
        if names
    ]
    return f"of {len(want)} tensors, {'; '.join(parts)}"
