"""What a program as if it had trained must keep: it is settled, its samples and tokens do not mix,
and its branches are the same in both modes, with the gradients of what they compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .branchwise import Call, calls, require_faithful
from .influence import noise_limit, require_apart
from .likeness import IncomparableError, Likeness
from .steady import require_settled
from .still import is_modeless
from .watch import branches
from .witness import Witness, different, whole_tensors


def require_kept(
    moved: Witness,
    inputs: Mapping[str, Tensor],
    departures: Mapping[str, Collection[str]],
    random: bool,
    what: str,
    earlier: Collection[str] = (),
    settled: Collection[str] | None = None,
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
        settled: the modules, by path, that the program before calls, two calls of which have given
            the same; None where nobody has seen that.
    """
    with calls(moved, branches(moved)) as seen:
        moved.outputs(inputs)
    if not whole_tensors(moved.program):
        require_settled(moved, moved.program.base, [inputs])
        return
    kinds = {p: _kind(moved.gm.get_submodule(p), c, departures.get(p, ())) for p, c in seen.items()}
    if settled is None or not _repeat(moved, seen, kinds, settled):
        require_settled(moved, moved.program.base, [inputs])
    if random:
        moved.expect()
    allowed = {*earlier, *(d for each in departures.values() for d in each)}
    require_apart(moved, inputs, allowed, what)
    limit = noise_limit(moved)
    looked_at: set[Any] = set()
    for path, said in departures.items():
        if path not in seen:
            continue
        kind = kinds[path] or path
        if kind not in looked_at:  # others of a kind run the same code on other numbers
            require_faithful(moved, path, seen[path], limit, said, what)
        looked_at.add(kind)
    moved.reset()


def _repeat(
    moved: Witness, seen: Mapping[str, Call], kinds: Mapping[str, Any], settled: Collection[str]
) -> bool:
    """Whether branches alone give again what they gave in the program, one of each kind: then the
    program does, whose other calls are those of a settled one."""
    known = {*settled, *branches(moved)}
    if moved.stateful or moved.moved() or not is_modeless(moved.gm, but=known):
        return False
    first = {kinds[path] or path: path for path in reversed(list(seen))}
    with torch.no_grad():
        return not any(
            different(seen[p].output, seen[p].of(moved.gm.get_submodule(p))) for p in first.values()
        )


def _kind(branch: nn.Module, call: Call, said: Collection[str]) -> Any:
    """Equal for calls of branches that run the same code; None where that cannot be told."""
    state = {n: v for n, v in vars(branch).items() if "hook" not in n}  # those that look on
    try:
        return Likeness().of((type(branch), state, call.leaves, call.moving, sorted(said)))
    except IncomparableError:
        return None
