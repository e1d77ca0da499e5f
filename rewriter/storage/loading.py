"""Loading saved adapters onto a model or program."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Program
from ..capture.capture import capture
from ..errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    RewriteError,
    nearest,
)  # fmt: skip
from ..files.identity import merkle_root
from ..graph.outside import outside_modes
from ..graph.sharded import equal
from ..inputs.probes import fit, probes
from ..inputs.spec import InputSpec
from ..measure.still import undisturbed
from ..measure.trials import described
from ..program.history import ITSELF, Certificate, Plan
from ..program.trained import train_only
from ..program.unchanged import base_digests, require_unchanged
from ..run.before_fold import values_then
from ..run.replay import load_values
from ..run.run import apply_plan, complete
from ..tracing.tracing import prepared
from ..verify.verify import check_graph
from .artifact import SAVED, Artifact, base_difference, differing, read
from .renaming import renamed

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


@outside_modes
def load(
    target: nn.Module | Program,
    directory: str | Path,
    *,
    name: str | None = None,
    allow_base_mismatch: bool = False,
    cache: bool | str | Path = False,
) -> Program:
    """Loads saved adapters onto a model or program.

    Args:
        target: the base model (captured with the saved input spec) or a program.
        directory: what `save` wrote.
        name: what to call its adapter; by default as it was saved. Two artifacts whose adapters
            have one name are loaded onto one program like this.
        allow_base_mismatch: accept base weights other than those trained on; the certificates
            in the history say so from then on, also once saved again.
        cache: of captures, see `capture`; a program is captured already.

    Returns:
        A new program in evaluation mode if `target` is; `target` is not changed.

    Raises:
        ArtifactError: (CorruptFileError, FormatTooNewError, BaseMismatchError) nothing is loaded.
        OptionError: `name` is no name, or the artifact holds several adapters.
    """
    artifact = read(directory)
    if name is not None:
        artifact = renamed(artifact, name, str(directory))
    captured = isinstance(target, Program)
    program = target if captured else _capture(target, artifact, cache)
    require_unchanged(program, values=captured)  # those of a new one have just been read
    have = base_digests(program)
    note = ""
    if merkle_root(have) != artifact.base_root:
        if not allow_base_mismatch:
            raise BaseMismatchError(base_difference(have, artifact.base, str(directory)))
        note = f"; loaded on another base ({differing(have, artifact.base)})"
    return attach(program, artifact, str(directory), note)


def attach(program: Program, artifact: Artifact, directory: str, note: str = "") -> Program:
    """Applies an artifact to a program whose base is known to be right; see `load`.

    `note` is added to the certificates: what whoever reads the history has to know.
    """
    if there := [n for n in artifact.adapters if n in program.adapters]:
        raise ArtifactError(
            f"{directory}: the program has an adapter {there[0]!r} already. Give this one another "
            f"name: load(..., name={there[0] + '_2'!r})."
        )
    _require_free(program, artifact, directory)
    current = program
    done: set[str] = set()
    where = directory
    explained = _explained(program, artifact)
    try:
        if artifact.trained or artifact.updated:
            current = program.fork()
            train_only(current, artifact.trained)
        current = current.fork()
        for index, (item, plan, certificate) in enumerate(artifact.steps):
            where = f"{directory}, recipe[{index}] ({item})"
            _require_sites(current, plan, where)
            current = apply_plan(current, item, plan, check=False, elements=explained, owned=True)
            said = Certificate(f"{SAVED}{certificate.removesuffix(note)}{note}")
            current.history = (
                *current.history[:-1],
                replace(current.history[-1], certificate=said),
            )
            reshaped = any(later.reshapes for later, _, _ in artifact.steps[index + 1 :])
            plans = [plan for _, plan, _ in artifact.steps[index + 1 :]]
            inserted = None if item.adapter is None or item.reshapes else [item.adapter]
            done |= _take(current, artifact, directory, reshaped, plans, inserted)
        if not artifact.steps:
            done |= _take(current, artifact, directory, False, ())
        complete(current)
        check_graph(current)
    except ArtifactError:
        raise
    except RewriteError as error:
        raise ArtifactError(f"{directory} cannot be applied to this model: {error}") from error
    except _DAMAGE as error:
        raise CorruptFileError(
            f"{where}: what the step decided cannot be replayed ({type(error).__name__}: {error}). "
            "The file was altered, or written by another version; save the adapter again."
        ) from error
    left = sorted(set(artifact.tensors) - done)
    if left:
        raise CorruptFileError(f"{directory}: the tensor {left[0]!r} belongs to no adapter.")
    return current


_DOUBLINGS = 8
"""How often the sizes grow at which a model is tried: to some 3000 tokens."""

_SPARE = 2**20
"""Elements that a step may make beside what tensors explain."""


def _explained(program: Program, artifact: Artifact) -> int:
    """How many elements a step of an artifact may make: each of them is a value of its tensors, or
    in the shape of one of the model's, a few times over."""
    base = program.base.base_tensors().values()
    return _SPARE + 4 * sum(t.numel() for t in (*base, *artifact.tensors.values()))


def _require_free(program: Program, artifact: Artifact, directory: str) -> None:
    """Raises ArtifactError where an artifact holds other values of a base tensor that the program
    has trained or updated: one of the two would be lost."""
    base = program.base.base_tensors()
    mine = {n: program.module.get_parameter(n) for n in sorted(program.tensors.trained)}
    for name, tensor in {**mine, **program.updated()}.items():
        saved = artifact.tensors.get(name)
        if saved is None or equal(saved, tensor) or name not in base:
            continue
        if not equal(base[name].to(tensor.dtype), tensor):
            owner = program.tensors.owner(name) or ""
            raise ArtifactError(
                f"{directory} holds other values of {name}, which "
                f"{f'the adapter {owner!r}' if owner else 'the program itself'} has trained: both "
                "are that one tensor of the base, so one would be lost. Load them into programs of "
                "their own."
            )


def _require_sites(program: Program, plan: Plan, where: str) -> None:
    """Raises CorruptFileError unless the program has all sites that a step edits."""
    sites: Any = plan.decisions.get("sites", [])
    if not isinstance(sites, list):
        raise CorruptFileError(f"{where}: 'sites' is no list. The file was altered.")
    known = {s.id for s in program.sites}
    for site in sites:  # pyright: ignore[reportUnknownVariableType]
        if site not in known:
            raise CorruptFileError(
                f"{where}: this model has no site {site!r}. Nearest: {nearest(str(site), known)}. "  # pyright: ignore[reportUnknownArgumentType]
                "Load it onto the model that it was trained on."
            )


def _take(
    program: Program,
    artifact: Artifact,
    where: str,
    reshaped: bool,
    later: Sequence[Plan],
    adapters: Sequence[str] | None = None,
) -> set[str]:
    """Loads the values of some adapters (all so far by default), as the steps found them of which
    `later` are the plans; their names."""
    mine = program.adapter_tensors(ITSELF)
    tensors = dict(program.module.named_buffers()) | dict(program.module.named_parameters())
    wanted = {n: mine[n] for n in artifact.trained} | {n: tensors[n] for n in artifact.updated}
    for name in artifact.adapters if adapters is None else adapters:
        wanted |= program.adapter_tensors(name)
    values = _fitting(wanted, artifact.tensors, where, reshaped)
    load_values(program, values_then(values, later), reshaped)
    return set(values)


def _fitting(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, reshaped: bool
) -> dict[str, Tensor]:
    """The saved values; all must be there and fit, unless a later step reshapes them."""
    if reshaped:
        fitting = {n: t.shape for n, t in tensors.items() if n in wanted}
        return {n: tensors[n] for n, shape in fitting.items() if shape == wanted[n].shape}
    for name, tensor in wanted.items():
        given = tensors.get(name)
        if given is None:
            raise CorruptFileError(f"{where}: the tensor {name!r} of an adapter is missing.")
        wider = torch.promote_types(given.dtype, tensor.dtype) != tensor.dtype
        if given.shape != tensor.shape or wider:
            raise CorruptFileError(
                f"{where}: {name!r} is {tuple(given.shape)} {given.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}."
            )
    return {name: tensors[name] for name in wanted}


def _capture(model: nn.Module, artifact: Artifact, cache: bool | str | Path) -> Program:
    spec = artifact.spec
    dynamic = {
        i.name: {a: str(s) for a, s in enumerate(i.shape) if isinstance(s, str)}
        for i in spec.inputs
    }
    dtype = artifact.dtype
    tried = model if dtype is None else copy.deepcopy(model).to(dtype)
    args, kwargs = spec.arguments(_example(tried, spec))
    del tried
    return capture(model, args, kwargs, dynamic=dynamic, dtype=dtype, cache=cache)


def _example(model: nn.Module, spec: InputSpec) -> dict[str, Tensor]:
    """Inputs that the model runs at: a spec does not say all that a model needs of its sizes.

    Raises:
        ArtifactError: it runs at none that were tried.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    said = ""
    for sizes in _tried(spec):
        example = {n: t.to(device) for n, t in spec.example(None, **sizes).items()}
        args, kwargs = spec.arguments({n: t.clone() for n, t in example.items()})
        try:
            if device.type != "meta":
                with undisturbed(model), prepared(model, False):
                    model(*args, **kwargs)
            return example
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            lines = str(error).strip().splitlines() or [""]
            said = f"{described(sizes)}: {type(error).__name__}: {lines[0][:200].rstrip('. ')}"
    raise ArtifactError(
        f"the model runs at none of the sizes that were tried ({spec}). Last, at {said}. Capture "
        "it with an example that it runs on, and load onto that: peftfx.load(program, directory)."
    )


def _tried(spec: InputSpec) -> Iterator[dict[str, int]]:
    """The sizes that programs are measured at, then longer ones and more rows of them."""
    usual = probes(spec, {})
    yield from usual
    lengths = set(spec.of_kind("token"))
    for growing in (lengths, set(spec.sizes)):
        for power in range(1, _DOUBLINGS + 1):
            wanted = {n: s << power if n in growing else s for n, s in usual[0].items()}
            if (sizes := fit(spec, wanted)) is not None:
                yield sizes
