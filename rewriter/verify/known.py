"""What is known of a program from the run that made it, as long as nothing of it has changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measure.witness import Witness
from ..program.fingerprint import checksum, hollow, is_at
from ..program.state import State
from .intact import Mark, tensors

_MOST = 1 << 26
"""Bytes of outputs that are kept with a program."""
_LARGE = 1 << 18
"""Bytes of a tensor that is summed up by itself."""


@dataclass(frozen=True)
class Known:
    """A witness with what it is true of: the tensors, and the values of those that may train.

    The values of all others were compared when the run began (`require_unchanged`).
    """

    witness: Witness
    marks: Mapping[str, Mark]
    values: Mapping[str, bytes]


_KNOWN: weakref.WeakKeyDictionary[State, Known] = weakref.WeakKeyDictionary()


def recalled(program: State, marks: Mapping[str, Mark]) -> Known:
    """What is kept of a program; a new witness where anything has changed since.

    It is taken away, so that no other thread uses it meanwhile.

    Args:
        program: unchanged as far as it has fingerprints.
        marks: of its tensors now.
    """
    known, values = _KNOWN.pop(program, None), _values(program)
    if known is None or known.marks != marks or known.values != values:
        return Known(Witness(program), marks, values)
    known.witness.program = program
    return known


def known(witness: Witness, marks: Mapping[str, Mark]) -> Known:
    """What is known of the program of a witness, with the marks of its tensors now."""
    return Known(witness, marks, _values(witness.program))


def keep(known: Known) -> None:
    """Keeps what is known of a program with it."""
    witness = known.witness
    if not witness.stateful and witness.size <= _MOST:
        _KNOWN[witness.program] = known
        del witness.program  # which would keep itself alive


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
    return sums | {str(kind): checksum(torch.cat(each)) for kind, each in small.items()}
