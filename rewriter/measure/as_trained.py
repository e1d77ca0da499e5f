"""What a program as if it had trained must keep: it is settled, its samples and tokens do not mix,
and its branches are the same in both modes, with the gradients of what they compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .branchwise import Call, calls, require_faithful
from .influence import noise_limit, require_apart
from .likeness import IncomparableError, Likeness
from .steady import require_settled
from .witness import Witness, whole_tensors


def require_kept(
    moved: Witness,
    inputs: Mapping[str, Tensor],
    departures: Mapping[str, Collection[str]],
    random: bool,
    what: str,
    earlier: Collection[str] = (),
) -> None:
    """Raises VerifyError for what a program does once its branches do something.

    Args:
        moved: of the program, see `steady.perturbed`.
        inputs: that it is called with; samples and tokens are two at least where they may be.
        departures: by path of the branches to look at, what their pass says of them, see
            `Pass.departures`.
        random: the captured model draws random numbers in evaluation mode.
        what: the pass, for messages.
        earlier: departures of what was in the program before these branches.
    """
    with calls(moved, departures) as seen:
        require_settled(moved, moved.program.base, [inputs])
    if not whole_tensors(moved.program):
        return
    if random:
        moved.expect()
    allowed = {*earlier, *(d for each in departures.values() for d in each)}
    require_apart(moved, inputs, allowed, what)
    limit = noise_limit(moved)
    looked_at: set[Any] = set()
    for path, said in departures.items():
        if path not in seen:
            continue
        kind = _kind(moved.gm.get_submodule(path), seen[path], said) or path
        if kind not in looked_at:  # others of a kind run the same code on other numbers
            require_faithful(moved, path, seen[path], limit, said, what)
        looked_at.add(kind)
    moved.reset()


def _kind(branch: nn.Module, call: Call, said: Collection[str]) -> Any:
    """Equal for calls of branches that run the same code; None where that cannot be told."""
    state = {n: v for n, v in vars(branch).items() if "hook" not in n}  # those that look on
    try:
        return Likeness().of((type(branch), state, call.leaves, call.moving, sorted(said)))
    except IncomparableError:
        return None
