"""Fingerprints of stored tensors: what has to stay as it is, and whether it has.

Programs share frozen storage with the model that they were captured from and with each other, so
`load_state_dict` or an optimizer on that model moves them too. Version counters tell of most
writes for nothing; a checksum of the values also tells of those through `.data` and through
memory that has no counter, and forgives a tensor that was moved or got its old values back.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import BaseChangedError
from .module import same_view, state_tensors
from .sharded import is_sharded
from .storage.identity import tensor_digest

if TYPE_CHECKING:
    from .program import Program

_COLUMNS = 1021
"""Words are laid out in rows of so many, of which rows and columns are added up. A prime: no
matrix has rows like that, which could change places unseen."""


@dataclass(frozen=True)
class Print:
    """One tensor as it was.

    Attributes:
        view: where it was, see `same_view`.
        version: its version counter, None where it has none (inference tensors).
        values: checksum of dtype, shape and values; None where reading all is too much (files).
    """

    view: tuple[Any, ...]
    version: int | None
    values: bytes | None


@dataclass(frozen=True)
class Fingerprints:
    """What a program must find unchanged, by name.

    Attributes:
        base: tensors of the captured program; what may train there counts from the first program
            that was derived from it.
        own: the program's own frozen tensors that are not the base's (folded weights).
    """

    base: Mapping[str, Print] = field(default_factory=dict[str, Print])
    own: Mapping[str, Print] = field(default_factory=dict[str, Print])


def checksum(tensor: Tensor) -> bytes:
    """16 bytes that follow from dtype, shape and values, on any device; reads the tensor once.

    Not `torch.hash_tensor`: it xors words, so `-w`, a permuted `w` and any constant look alike.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    raw = flat.view(torch.uint8)
    digest = hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode(), digest_size=16)
    rows = raw.numel() // (8 * _COLUMNS)
    if rows > 1:
        head, raw = raw[: rows * 8 * _COLUMNS], raw[rows * 8 * _COLUMNS :]
        if head.storage_offset() % 8:
            head = head.clone()  # words lie at multiples of their size
        words = head.view(torch.int64).view(rows, _COLUMNS)
        for axis in (0, 1):
            digest.update(words.sum(axis).cpu().numpy().data)
    digest.update(raw.cpu().numpy().data)
    return digest.digest()


def take(program: Program, values: bool = True) -> Fingerprints:
    """Fingerprints of a program: those that it has already, and of what is new.

    Args:
        program: its base may be on the meta device; what has no values has no fingerprint.
        values: with checksums; without where tensors are mapped from files.
    """
    known, base = program.prints or Fingerprints(), program.base
    of_base = settled(program) if base is program else base.base_tensors()
    prints = _printed(of_base, known.base, values)
    if base is program:
        return Fingerprints(prints)
    mine = {n: t for n, t in settled(program).items() if not _is_at(t, prints.get(n))}
    return Fingerprints(prints, _printed(mine, known.own, values))


def settled(program: Program) -> dict[str, Tensor]:
    """The program's tensors outside of branches that nothing may change: they do not train, and
    no batch updates them."""
    gm = program.module
    moving = {n for n, p in gm.named_parameters() if p.requires_grad} | state_tensors(gm)
    moving |= {n for names in program.owned.values() for n in names}
    return {n: t for n, t in program.base_tensors().items() if n not in moving}


def changed(program: Program, values: bool = True) -> list[str]:
    """Names of the tensors that are not what they were when the program was made.

    Args:
        values: compare all checksums; else only where a version counter or the place says so.
    """
    prints = program.prints or Fingerprints()
    of_base, own = program.base.base_tensors(), program.base_tensors()
    names = {n for n, p in prints.base.items() if _differs(of_base.get(n), p, values)}
    names |= {n for n, p in prints.own.items() if _differs(own.get(n), p, values)}
    return sorted(names)


def training_shared(program: Program) -> list[str]:
    """Names of parameters that train in memory which the base, the model or other programs use."""
    prints = program.prints or Fingerprints()
    places = {p.view[0] for p in (*prints.base.values(), *prints.own.values())}
    trained = program.named_trainable_parameters()
    return sorted(n for n, p in trained.items() if not _hollow(p) and p.data_ptr() in places)


_DIGESTS: weakref.WeakKeyDictionary[Program, dict[str, tuple[bytes, str]]] = (
    weakref.WeakKeyDictionary()
)
"""Of captured programs, by a tensor's name: its checksum, and its digest as long as that holds."""


def base_digests(program: Program) -> dict[str, str]:
    """The digests of the tensors of a program's base by name, each computed once.

    Only for a program that `require_unchanged` has just found unchanged: a tensor is hashed again
    where its fingerprint is another one, or where it has none (it may train, or is sharded).

    Raises:
        MetaTensorError: a tensor has no values.
    """
    known, prints = _DIGESTS.setdefault(program.base, {}), program.prints or Fingerprints()
    digests: dict[str, str] = {}
    for name, tensor in program.base.base_tensors().items():
        printed = prints.base.get(name)
        values = None if printed is None or not _is_at(tensor, printed) else printed.values
        held = known.get(name)
        if values is not None and held is not None and held[0] == values:
            digests[name] = held[1]
            continue
        digests[name] = tensor_digest(tensor)
        if values is not None:
            known[name] = values, digests[name]
    return digests


def require_unchanged(program: Program, values: bool = True) -> None:
    """Raises BaseChangedError if stored tensors were changed, or train where others use them.

    Args:
        values: see `changed`.
    """
    if names := changed(program, values):
        raise BaseChangedError(
            f"{_listed(names)} changed since the program was made. It shares frozen storage with "
            "the model that it was captured from, and with programs made from each other, so "
            "load_state_dict, an optimizer or an in-place edit of one changes all, and what was "
            "learnt and measured on the old values is no longer true. Capture "
            "copy.deepcopy(model), or load exported tensors into a copy of the model. To go on, "
            "give the tensors their old values back, or capture again."
        )
    if names := training_shared(program):
        raise BaseChangedError(
            f"{_listed(names)} requires gradients, but shares storage with the captured base (and "
            "with the model, if it was frozen at capture), which training would change. Let a "
            "pass train it (train{where=...}; Editor.train in one of your own), or set "
            "requires_grad on the model before capture, which copies it."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more}"


def _hollow(tensor: Tensor) -> bool:
    """Whether there is nothing to compare here: no values, or a rank's own copy of its part."""
    return tensor.is_meta or is_sharded(tensor) or not tensor.numel()


def _printed(
    tensors: Mapping[str, Tensor], known: Mapping[str, Print], values: bool
) -> dict[str, Print]:
    prints: dict[str, Print] = {}
    for name, tensor in tensors.items():
        if name in known and (_hollow(tensor) or _is_at(tensor, known[name])):
            prints[name] = known[name]
        elif not _hollow(tensor):
            read = checksum(tensor) if values else None
            prints[name] = Print(same_view(tensor), _version(tensor), read)
    return prints


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_at(tensor: Tensor, printed: Print | None) -> bool:
    """Whether a tensor is where its fingerprint was taken."""
    return printed is not None and not _hollow(tensor) and same_view(tensor) == printed.view


def _differs(tensor: Tensor | None, printed: Print, values: bool) -> bool:
    if tensor is None or _hollow(tensor):
        return False
    version = _version(tensor)
    same = _is_at(tensor, printed) and version == printed.version
    if printed.values is None:
        return _is_at(tensor, printed) and not same
    if same and version is not None and not values:
        return False
    return checksum(tensor) != printed.values
