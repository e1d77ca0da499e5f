"""What must be settled before outputs can be compared: two calls give the same, and training mode
differs from evaluation as it did before."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import VerifyError
from ..graph.sharded import is_sharded
from ..program.state import State
from .compare import Gap, compare
from .still import Expected
from .witness import Witness, different, repeats

NOISE = 0.1
"""Scale of the noise on what trains in branches: what is zero at first hides what they do."""


@contextlib.contextmanager
def perturbed(witness: Witness, names: Collection[str], seed: int = 0) -> Iterator[Witness]:
    """A program as if it had trained: with noise on parameters of branches.

    Args:
        witness: of the program; meanwhile its copy has the noise.
        names: of parameters. Those outside of branches stay.
        seed: of the noise.

    Yields:
        A witness of that.
    """
    parameters = dict(witness.gm.named_parameters())
    known = {n: parameters[n] for n in names if n in parameters and witness.program.inserts(n)}
    generator = torch.Generator().manual_seed(seed)
    before = [(p, p.data) for p in known.values() if p.is_floating_point() and not is_sharded(p)]
    try:
        for parameter, values in before:
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            parameter.data = values + noise.to(values)
        yield witness.again()
    finally:
        for parameter, values in before:
            parameter.data = values


def quieten(before: Witness, after: Witness, rounds: Sequence[Mapping[str, Tensor]]) -> str:
    """Lets random operators have their expected value in both, if the program before draws random
    numbers in evaluation mode; says what `repeats` says of it."""
    known = [inputs for inputs in rounds if before.has_seen(inputs)]  # before the pass planned
    was = repeats(before, _smallest(known or rounds))
    if before.expected and not was:  # as an earlier pass of the pipeline has left it
        was = "random"
    if was.startswith("random"):
        for witness in (before, after):
            witness.expect()
    return was


def _smallest(rounds: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return min(rounds, key=lambda i: sum(t.numel() for t in i.values()))


def require_steady(
    before: Witness, after: Witness, rounds: Sequence[Mapping[str, Tensor]], again: bool = False
) -> str:
    """Raises VerifyError unless a second call gives the same, as far as it did in the captured
    model: what an earlier branch does excuses nothing.

    Args:
        before, after: what is compared.
        rounds: inputs that both were called with.
        again: this is asked again of `after` with noise on what trains, which shows more.

    Returns:
        What the captured model does instead, and how outputs are compared then; empty for models
        whose calls agree.
    """
    inputs = _smallest(rounds)
    once = again and _agree(before, after, rounds)
    now = "" if once else repeats(after, inputs)
    was = quieten(before, after, rounds)
    if was.startswith("changed"):
        raise VerifyError(
            "the pass changed the program that it was given, whose outputs are not what they were "
            f"({was.removeprefix('changed: ')}). Passes read it in `plan` and change a fork in "
            "`apply`. It shares storage with others: load its weights again, or capture again."
        )
    _require_excused(now, after, before.program.base, inputs)
    if writes := after.moved() - before.moved():
        raise VerifyError(
            f"the result writes {min(writes)} in evaluation mode, which the program before does "
            "not. Only training may update buffers."
        )
    before.settled, after.settled = not was, not now and not once
    return next((said for word, said in _GIVEN.items() if was.startswith(word)), "")


def _agree(before: Witness, after: Witness, rounds: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether two programs without a state of their own agree bit for bit."""
    if before.stateful or after.stateful:
        return False
    return not any(different(before.outputs(i), after.outputs(i)) for i in rounds)


_GIVEN = {
    "random": "the captured model draws random numbers in evaluation mode; compared with each at "
    "its expected value",
    "drifts": "the captured model's state drifts in evaluation mode; compared from the same state",
}


def require_settled(witness: Witness, base: State, rounds: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises VerifyError unless a second call gives the same, as far as it does in `base`."""
    inputs = _smallest(rounds)
    _require_excused(repeats(witness, inputs), witness, base, inputs)


def _require_excused(
    now: str, after: Witness, captured: State, inputs: Mapping[str, Tensor]
) -> None:
    """Raises VerifyError for what `repeats` says of a program, but not of the captured one."""
    if not now:
        return
    base = Witness(captured)
    was = repeats(base, inputs)
    if now.startswith("random") and not was:
        raise VerifyError(
            "the result draws random numbers in evaluation mode, which the captured model does "
            f"not: two calls on equal inputs differ ({now.removeprefix('random: ')})."
        )
    if now.startswith("random") and (more := _drawn(after, inputs) - _drawn(base, inputs)):
        raise VerifyError(
            "the result draws more random numbers in evaluation mode than the captured model: "
            f"{min(more)} runs {more[min(more)]} times more."
        )
    if not was:
        raise VerifyError(
            "the result's state drifts in evaluation mode: two calls on equal inputs differ "
            f"({now.partition(': ')[2]}). Only training may update buffers."
        )


def _drawn(witness: Witness, inputs: Mapping[str, Tensor]) -> Counter[str]:
    """How often each random operator runs in evaluation mode."""
    counts: Counter[str] = Counter()
    witness.reset()
    with Expected() as mode:
        witness.forward(witness.completed(inputs))
    for (name, *_), count in mode.draws.items():
        counts[name] += count
    return counts


def trained(
    before: Witness, after: Witness, inputs: Mapping[str, Tensor], *, grows: bool
) -> list[Gap]:
    """The gaps in training mode; none if the program before does not run there.

    Args:
        before, after: what is compared.
        inputs: that they are called with.
        grows: the pass may add random operators, and must take none away; else the other way round.
    """
    try:
        want, drawn = before.in_training(inputs)
    except Exception:  # noqa: BLE001 - whatever the model raises, there is nothing to compare
        return []
    try:
        got, drawing = after.in_training(inputs)
    except Exception as error:
        raise VerifyError(f"the result does not run in training mode: {error}") from error
    # Branches may have dropout of their own, which goes when they fold; the model's own stays.
    more, less = (drawing, drawn) if grows else (drawn, drawing)
    if lost := less - more:
        name, shape, numbers = next(iter(lost))
        raise VerifyError(
            f"dropout or other noise changes in training mode: {name} {numbers} on {shape} runs "
            f"{lost.total()} times {'less' if grows else 'more'}."
        )
    silent = after.written() - before.written()
    if silent:
        raise VerifyError(
            f"{min(silent)} is written in training mode, but its module does not say so: set "
            "`updates_state = True` there, so that programs do not share it."
        )
    return compare(want, got)
