"""Whether what a program shares with others is still what it was."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import BaseChangedError
from ..files.identity import tensor_digest
from .fingerprint import Fingerprints, Print, differs, hollow, is_at
from .state import State


def changed(program: State, values: bool = True) -> list[str]:
    """Names of the tensors that are not what they were when the program was made.

    Args:
        values: compare all checksums; else only where a version counter or the place says so.
    """
    prints = program.prints or Fingerprints()
    of_base, own = program.base.base_tensors(), program.base_tensors()
    names = {n for n, p in prints.base.items() if differs(of_base.get(n), p, values)}
    names |= {n for n, p in prints.own.items() if differs(own.get(n), p, values)}
    return sorted(names)


def training_shared(program: State) -> list[str]:
    """Names of parameters that train in memory which the base, the model or other programs use."""
    prints = program.prints or Fingerprints()
    places = {p.view[0] for p in (*prints.base.values(), *prints.own.values())}
    trained = program.named_trainable_parameters()
    return sorted(n for n, p in trained.items() if not hollow(p) and p.data_ptr() in places)


def require_unchanged(program: State, values: bool = True) -> None:
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


_DIGESTS: dict[Print, tuple[StorageWeakRef, str]] = {}
"""Of tensors of captured programs: their memory, and the digest while that lives and they are what
they were."""


def base_digests(program: State) -> dict[str, str]:
    """The digests of the tensors of a program's base by name, each computed once, also for several
    captures of one model.

    Only for a program that `require_unchanged` has just found unchanged: a tensor is hashed again
    where its fingerprint is another one, or where it has none (it may train, or is sharded).

    Raises:
        MetaTensorError: a tensor has no values.
    """
    prints, count = program.prints or Fingerprints(), len(_DIGESTS)
    digests = {
        name: _digest(tensor, prints.base.get(name))
        for name, tensor in program.base.base_tensors().items()
    }
    if len(_DIGESTS) > count:
        for printed in [p for p, (memory, _) in _DIGESTS.items() if memory.expired()]:
            del _DIGESTS[printed]
    return digests


def _digest(tensor: Tensor, printed: Print | None) -> str:
    if printed is None or printed.values is None or not is_at(tensor, printed):
        return tensor_digest(tensor)
    known = _DIGESTS.get(printed)
    if known is None or known[0].expired():
        known = StorageWeakRef(tensor.untyped_storage()), tensor_digest(tensor)
        _DIGESTS[printed] = known
    return known[1]
