"""Inputs that programs are measured at: sizes at which the captured model itself runs.

What is known of a model's sizes does not say where it fails: a token that is read by its index, or
the two largest of one. So every size is tried once on the captured model, and the nearest one at
which it runs takes the place of one at which it does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import VerifyError
from ..graph.module import device_of
from ..inputs.probes import fit, probes, smallest
from ..inputs.spec import InputSpec
from ..program.state import State
from .still import forward, still
from .witness import completed

Shapes = tuple[tuple[str, tuple[int, ...]], ...]

_MADE: weakref.WeakKeyDictionary[
    State, tuple[InputSpec, Mapping[str, Tensor], list[dict[str, Tensor]]]
] = weakref.WeakKeyDictionary()
"""The inputs that were made of a program's spec and sample."""

_TRIED: weakref.WeakKeyDictionary[State, dict[Shapes, str]] = weakref.WeakKeyDictionary()
"""Of captured programs: by the shapes of their inputs, why they do not run; empty if they do."""


def sizes(program: State) -> list[dict[str, Tensor]]:
    """The captured example, cut or repeated to a few small sizes that the spec allows.

    Raises:
        VerifyError: the captured model runs at none.
    """
    device, known = device_of(program.module), _MADE.get(program)
    if known is None or known[0] is not program.spec or known[1] is not program.sample:
        rounds = [program.spec.resize(program.sample, **wanted) for wanted in measured(program)]
        _MADE[program] = known = program.spec, program.sample, rounds
    return [{n: t.to(device) for n, t in inputs.items()} for inputs in known[2]]


def small(program: State) -> dict[str, Tensor] | None:
    """The captured example at the smallest sizes without ones; None where the captured model does
    not run there."""
    wanted = smallest(program.spec)
    if wanted is None or _failure(program, wanted):
        return None
    device = device_of(program.module)
    inputs = program.spec.resize(program.sample, **wanted)
    return {n: t.to(device) for n, t in inputs.items()}


def measured(program: State) -> list[dict[str, int]]:
    """Those sizes by name; in the first all are two at least, where they may be.

    Raises:
        VerifyError: the captured model runs at none.
    """
    spec, reason = program.spec, ""
    own = spec.sizes_of(program.sample)
    chosen: list[dict[str, int]] = []
    for wanted in probes(spec, own):
        for each in (wanted, *_towards(spec, wanted, own)):
            if not (reason := _failure(program, each)):
                if each not in chosen:
                    chosen.append(each)
                break
    if not chosen:
        raise VerifyError(
            "the program cannot be measured: the captured model fails at every size that was "
            f"tried. Last, at {described(own)}: {reason}. Capture it with an example it runs on."
        )
    return chosen


def left_out(program: State) -> tuple[str, ...]:
    """A line for all sizes that others have replaced, and why; none for most models."""
    spec = program.spec
    wanted = probes(spec, spec.sizes_of(program.sample))
    reasons = {described(each): _failure(program, each) for each in wanted}
    return tuple(f"not measured at {each}: {reason}" for each, reason in reasons.items() if reason)


def described(sizes: Mapping[str, int]) -> str:
    """`batch=2, sequence=12`."""
    return ", ".join(f"{n}={size}" for n, size in sizes.items()) or "fixed sizes"


def _towards(
    spec: InputSpec, wanted: Mapping[str, int], own: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Valid sizes from the wanted ones to the example's own, in growing steps: lengths first."""
    lengths = {n for n in wanted if n in spec.of_kind("token")}
    for moving in (lengths, set(wanted)):
        ends = {n: own.get(n, s) if n in moving else s for n, s in wanted.items()}
        step, near = 1, dict(wanted)
        while near != ends:
            near = {n: _moved(s, ends[n], step) for n, s in wanted.items()}
            if (fitting := fit(spec, near)) is not None:
                yield fitting
            step *= 2


def _moved(size: int, end: int, step: int) -> int:
    return min(size + step, end) if size < end else max(size - step, end)


def _failure(program: State, wanted: Mapping[str, int]) -> str:
    """Why the captured model does not run at the sizes; empty if it does."""
    base = program.base
    if any(p.is_meta for p in base.module.parameters()):
        return ""
    on_cpu = device_of(base.module).type == "cpu"
    if not on_cpu and (name := beyond(program.spec, program.sample, wanted)):
        return f"{name} may hold indices beyond that, and on a GPU such an error ends the process"
    given = completed(base, program.spec.resize(program.sample, **wanted))
    tried = _TRIED.setdefault(base, {})
    shapes = tuple((n, tuple(t.shape)) for n, t in given.items())
    if shapes not in tried:
        tried[shapes] = _tried(base, given)
    return tried[shapes]


def beyond(spec: InputSpec, sample: Mapping[str, Tensor], wanted: Mapping[str, int]) -> str:
    """The first integer input that may hold indices which the wanted sizes are too small for.

    Its values, other than the zeros and ones of masks, are below a size of the sample, and not
    below the wanted one; empty if there is none.
    """
    own, cut = spec.sizes_of(sample), spec.resize(sample, **wanted)
    for name, tensor in cut.items():
        if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel():
            continue
        kept, all_of = int(tensor.max()), int(sample[name].max())
        if kept > 1 and any(size <= kept and all_of < own.get(n, 0) for n, size in wanted.items()):
            return name
    return ""


def _tried(base: State, given: Mapping[str, Tensor]) -> str:
    device = device_of(base.module)
    dtypes = {i.name: i.dtype for i in base.spec.inputs}  # an exporter may ask in another one
    try:
        base.spec.check(base.spec.sizes_of(given))
        forward(still(base), {n: t.to(device, dtypes[n]) for n, t in given.items()})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a model may raise anything
        lines = str(error).strip().splitlines() or [""]
        said = lines[0][:200].rstrip(". ")
        return f"the model fails there ({type(error).__name__}: {said})"
    return ""
