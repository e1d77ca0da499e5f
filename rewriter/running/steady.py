"""What must be settled before outputs can be compared: two calls give the same, and training mode
differs from evaluation as it did before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import VerifyError
from .compare import Gap, compare
from .still import forward, written
from .witness import Witness, repeats


def quieten(before: Witness, after: Witness, rounds: Sequence[Mapping[str, Tensor]]) -> str:
    """Lets random operators have their expected value in both, if the program before draws random
    numbers in evaluation mode; says what `repeats` says of it."""
    was = repeats(before, _smallest(rounds))
    if was.startswith("random"):
        for witness in (before, after):
            witness.expected = True
            witness.forget()
    return was


def _smallest(rounds: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return min(rounds, key=lambda i: sum(t.numel() for t in i.values()))


def require_steady(before: Witness, after: Witness, rounds: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises VerifyError unless a second call gives the same, as far as it did before the pass."""
    now = repeats(after, _smallest(rounds))
    was = quieten(before, after, rounds)
    if was.startswith("changed"):
        raise VerifyError(
            "the pass changed the program that it was given, whose outputs are not what they were "
            f"({was.removeprefix('changed: ')}). Passes read it in `plan` and change a fork in "
            "`apply`. It shares storage with others: load its weights again, or capture again."
        )
    if now.startswith("random") and not was:
        raise VerifyError(
            "the result draws random numbers in evaluation mode, which the program before does "
            f"not: two calls on equal inputs differ ({now.removeprefix('random: ')})."
        )
    if now and not was:
        raise VerifyError(
            "the result's state drifts in evaluation mode: two calls on equal inputs differ "
            f"({now.partition(': ')[2]}). Only training may update buffers."
        )
    if writes := after.moved() - before.moved():
        raise VerifyError(
            f"the result writes {min(writes)} in evaluation mode, which the program before does "
            "not. Only training may update buffers."
        )


def trained(
    before: Witness, after: Witness, inputs: Mapping[str, Tensor], *, grows: bool
) -> list[Gap]:
    """The gaps in training mode; none if the program before does not run there.

    Args:
        before, after: what is compared.
        inputs: that they are called with.
        grows: the pass may add random operators, and must take none away; else the other way round.
    """
    with before.training() as drawn:
        try:
            want = forward(before.gm, before.completed(inputs))
        except Exception:  # noqa: BLE001 - whatever the model raises, there is nothing to compare
            return []
    with after.training() as drawing:
        try:
            got = forward(after.gm, after.completed(inputs))
        except Exception as error:
            raise VerifyError(f"the result does not run in training mode: {error}") from error
    # Branches may have dropout of their own, which goes when they fold; the model's own stays.
    more, less = (drawing, drawn) if grows else (drawn, drawing)
    if lost := less.draws - more.draws:
        name, shape, numbers = next(iter(lost))
        raise VerifyError(
            f"dropout or other noise changes in training mode: {name} {numbers} on {shape} runs "
            f"{lost.total()} times {'less' if grows else 'more'}."
        )
    silent = written(after.gm) - written(before.gm)
    if silent:
        raise VerifyError(
            f"{min(silent)} is written in training mode, but its module does not say so: set "
            "`updates_state = True` there, so that programs do not share it."
        )
    return compare(want, got)
