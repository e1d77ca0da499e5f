"""What is known of a program from the run that made it, as long as nothing of it has changed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measure.witness import Outputs, Witness
from ..program.fingerprint import checksum, hollow, is_at
from ..program.state import State
from .intact import Mark, tensors

_MOST = 1 << 26
"""Bytes of outputs that are kept with a program."""
_LARGE = 1 << 18
"""Bytes of a tensor that is summed up by itself."""


Places = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Known:
    """A witness with what it is true of: the tensors, and the values of those that may train.

    The values of all others were compared when the run began (`require_unchanged`).
    """

    witness: Witness
    places: Places
    values: Mapping[str, bytes]


_KNOWN: weakref.WeakKeyDictionary[State, tuple[Outputs, Places, Mapping[str, bytes]]] = (
    weakref.WeakKeyDictionary()
)
"""Outputs alone: neither a copy nor a tensor of a program, whose memory may be asked back."""


def recalled(program: State, marks: Mapping[str, Mark]) -> Known:
    """What is kept of a program; a new witness where anything has changed since.

    It is taken away, so that no other thread uses it meanwhile.

    Args:
        program: unchanged as far as it has fingerprints.
        marks: of its tensors now.
    """
    kept, places, values = _KNOWN.pop(program, None), _places(marks), _values(program)
    if kept is None or kept[1:] != (places, values):
        return Known(Witness(program), places, values)
    return Known(Witness(program, kept[0]), places, values)


def known(witness: Witness, marks: Mapping[str, Mark]) -> Known:
    """What is known of the program of a witness, with the marks of its tensors now."""
    return Known(witness, _places(marks), _values(witness.program))


def keep(known: Known) -> None:
    """Keeps what is known of a program with it."""
    outputs, program = known.witness.known, known.witness.program
    if outputs.size <= _MOST and not known.witness.stateful:
        _KNOWN[program] = outputs, known.places, known.values


def _places(marks: Mapping[str, Mark]) -> Places:
    return {n: (m.identity, m.view, m.version, m.trains) for n, m in marks.items()}


def _values(program: State) -> dict[str, bytes]:
    """Checksums of the tensors that have no fingerprint: what trains, and what branches hold."""
    prints = {} if program.prints is None else {**program.prints.base, **program.prints.own}
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sums: dict[str, bytes] = {}
    for name, tensor in tensors(program).items():
        if hollow(tensor) or is_at(tensor, prints.get(name)):
            continue
        if tensor.nbytes > _LARGE:
            sums[name] = checksum(tensor)
        else:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach().reshape(-1))
    return sums | {f"{kind} {i}": s for kind, each in small.items() for i, s in _blocks(each)}


def _blocks(tensors: list[Tensor]) -> Iterator[tuple[int, bytes]]:
    """Checksums of flat tensors of one kind, of some at a time that a processor's cache holds."""
    start, size, room = 0, 0, torch.empty(0)
    for end, tensor in enumerate(tensors, 1):
        size += tensor.numel()
        if end == len(tensors) or size * tensor.itemsize > 2 * _LARGE:
            room = room if room.numel() >= size else tensor.new_empty(size)
            yield start, checksum(torch.cat(tensors[start:end], out=room[:size]))
            start, size = end, 0
