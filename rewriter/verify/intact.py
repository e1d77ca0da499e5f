"""What a pass has to leave as it was: the program that it was given, names, and other adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VerifyError
from ..graph.module import same_view, state_tensors, transient_buffers
from ..graph.sharded import is_sharded
from ..graph.walks import stored
from ..pipeline.passes import Pass
from ..program.state import State

EDITORS = ("features", "own")
"""Buffers of branches that the editor makes from the site."""


@dataclass
class Mark:
    """One tensor of a program at one time; its object, memory, version counter and flag."""

    tensor: Tensor = field(compare=False)
    identity: int
    view: tuple[Any, ...]
    version: int
    trains: bool


def marks(program: State) -> dict[str, Mark]:
    """All tensors of a program and of its base as they are now, at no cost."""
    by_name: dict[str, Mark] = {}
    for each in {id(p): p for p in (program, program.base)}.values():
        gm = each.module
        tensors = [*stored(gm), *each.extras.items()]
        tensors += [*each.sample.items(), *each.removed.items()]
        # Forwards of another thread may update these.
        moving = state_tensors(gm) if gm.training else set[str]()
        for name, tensor in tensors:
            if name in moving:
                continue
            where = name if each is program else f"{name} of the base"
            version = -1 if tensor.is_inference() else tensor._version
            by_name[where] = Mark(tensor, id(tensor), _view(tensor), version, tensor.requires_grad)
    return by_name


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return () if tensor.is_meta or is_sharded(tensor) else same_view(tensor)


def require_unmoved(program: State, before: Mapping[str, Mark], what: str) -> None:
    """Raises VerifyError if the program that a pass was given is not as it was.

    Flags are put back; values cannot be.

    Args:
        program: that the pass was given.
        before: its marks from before the pass planned.
        what: the pass.
    """
    after = marks(program)
    moved = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    if not moved:
        return
    for mark in before.values():
        if mark.tensor.requires_grad != mark.trains and mark.tensor.is_leaf:
            mark.tensor.requires_grad_(mark.trains)
    name = min(moved)
    old, new = before.get(name), after.get(name)
    if old is None or new is None:
        how = "was added or lost"
    elif old.trains != new.trains:
        how = f"requires {'gradients' if new.trains else 'no gradients any more'}"
    else:
        how = "was written in place" if old.version != new.version else "is another tensor"
    raise VerifyError(
        f"{what} changed the program that it was given, and with it all that share its storage: "
        f"{name} {how} ({len(moved)} in all). A pass reads it in `plan`, and changes a fork "
        "through the editor in `apply`. If another thread trains this program meanwhile, run "
        "passes on program.fork(). Otherwise load the weights again, or capture again."
    )


def require_names(before: State, after: State, what: str) -> None:
    """Raises VerifyError if a pass lost names by which a program is used, saved or exported."""
    gm = after.module
    own = {n for n, _ in (*gm.named_parameters(), *gm.named_buffers())} | set(after.extras)
    stems = {n.rpartition(".")[0] for n in own}

    def exists(name: str) -> bool:
        source = after.tensors.stored(name)
        return source in own or name in own or source in stems

    def _dropped(size: str) -> bool:
        inputs = [i for i in before.spec.inputs if size in i.shape]
        return all(i.name not in after.spec.names or size in after.spec.reasons for i in inputs)

    lost = {
        "alias": [n for n, c in before.aliases.items() if after.aliases.get(n) != c],
        "name of the original model": [n for n in before.state_names if n not in after.state_names],
        "stored tensor": [n for n in after.state_names if not exists(n)],
        "input": [
            n for n in before.spec.names
            if n not in after.spec.names and n not in after.spec.reasons
        ],
        "parameter of forward": [
            n for n in before.spec.parameters
            if n not in after.spec.parameters and n not in after.spec.reasons
        ],
        "size": [n for n in before.spec.sizes if n not in after.spec.sizes and not _dropped(n)],
        "site": [s.id for s in before.sites if s.id not in {t.id for t in after.sites}],
        "example of the input": [n for n in after.spec.names if n not in after.sample],
        "adapter's tensor": [
            n for n in sorted(after.tensors.trained) if n not in own
        ],
        "generation setting": [n for n in before.generation if n not in after.generation],
    }  # fmt: skip
    for kind, names in lost.items():
        if names:
            raise VerifyError(f"{what} loses the {kind} {names[0]!r} ({len(names)} in all).")
    for node in gm.graph.nodes:
        path = str(node.target)
        inserted = node.op == "call_module" and path.startswith("peftfx.")
        if inserted and not after.inserts(f"{path}."):
            raise VerifyError(f"{what}: the graph calls {path}, which belongs to no adapter.")


def require_others(before: State, after: State, item: Pass, free: bool) -> None:
    """Raises VerifyError if an inserting pass changed tensors that are not its own.

    Args:
        before, after: the programs.
        item: the pass.
        free: its contract says nothing of the outputs, so only this tells of base tensors.
    """
    owner = item.adapter
    if owner is None or item.reshapes:
        return
    old, new = tensors(before), tensors(after)
    mine = {n for n in after.owned.get(owner, ()) if n not in before.owned.get(owner, ())}
    for name, tensor in new.items():
        base = not name.startswith("peftfx.")
        if name not in old or name in mine or (base and (item.rewrites or not free)):
            continue
        if not _same(old[name], tensor):
            of = "the base" if base else f"the adapter {name.split('.')[1]!r}"
            raise VerifyError(
                f"{item} changed {name}, a tensor of {of}, which it does not train. Say so with "
                "edit.train, or leave it alone."
            )


def require_saved(before: State, after: State, what: str, again: Callable[[], State]) -> None:
    """Raises VerifyError if a branch holds values that neither an artifact nor its recipe has.

    Args:
        before, after: the programs.
        what: the pass.
        again: does it again, from what an artifact would hold. Buffers that are not persistent
            come from there.
    """
    names = [n for n in unsaved(after) if not before.inserts(n)]
    if not names:
        return
    want, got = tensors(after), tensors(again())
    for name in names:
        if name in want and (name not in got or not _same(want[name], got[name])):
            raise VerifyError(
                f"{what}: the buffer {name} would be lost by saving: it is not persistent, and the "
                "recipe makes it with other values. Register it as persistent, draw with "
                "edit.generator, or put it into the plan."
            )


_Number = bool | int | float | complex | str
_PLAIN = frozenset({type(None), bool, int, float, complex, str})


def numbers(program: State) -> dict[str, Any]:
    """Numbers and words that branches hold as plain attributes, by path and name: the recipe makes
    them, and no artifact holds them."""
    return {
        f"{path}.{name}": value
        for path, module in program.inserted()
        if not vars(module).get("updates_state", getattr(type(module), "updates_state", False))
        for name, value in vars(module).items()
        if name[0] != "_" and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if issubclass(kind, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _Number)


def require_numbers(program: State) -> None:
    """Raises VerifyError if a number on a branch is not what the passes made it."""
    now = numbers(program)
    for name, value in program.numbers.items():
        if name in now and repr(now[name]) != repr(value):
            raise VerifyError(
                f"{name} was changed outside of training, from {value!r} to {now[name]!r}, and "
                "would be lost by saving: the recipe makes it. Give it its old value back, and run "
                "the pass with another option instead."
            )


def unsaved(program: State) -> list[str]:
    """Names of the tensors of branches that no artifact holds: the recipe makes them again."""
    names = transient_buffers(program.module) | _plain(program).keys()
    return [
        n for n in sorted(names)
        if program.inserts(n) and n.rpartition(".")[2] not in EDITORS
    ]  # fmt: skip


def _plain(program: State) -> dict[str, Tensor]:
    """Tensors that branches hold as plain attributes, which torch neither moves nor saves."""
    return {
        f"{path}.{name}": value
        for path, module in program.inserted()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def require_values(program: State) -> None:
    """Raises VerifyError if a parameter holds NaN."""
    for name, parameter in program.module.named_parameters():
        if parameter.is_meta or is_sharded(parameter) or not parameter.is_floating_point():
            continue
        if bool(parameter.detach().isnan().any()):
            count = int(parameter.detach().isnan().sum())
            raise VerifyError(
                f"the parameter {name} holds {count} NaN. Go on from a checkpoint before "
                "they came, with a smaller learning rate."
            )


def require_recorded(replayed: State, program: State) -> None:
    """Raises VerifyError if stored tensors are not what replaying the history gives.

    What trains, and what batches update, may have any value; all else is computed again.
    """
    old, new = tensors(replayed), tensors(program)
    cached = _plain(program).keys() ^ _plain(replayed).keys()
    if odd := sorted((old.keys() ^ new.keys()) - cached):
        raise VerifyError(f"the program is not what its history says: that does not make {odd[0]}.")
    new = {n: t for n, t in new.items() if n in old}
    moving = state_tensors(program.module)
    for name, tensor in new.items():
        want = old[name]
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and not want.requires_grad:
            raise VerifyError(
                f"{name} requires gradients, but no pass of the history made it trainable. It may "
                "be shared with other programs: train it with a pass (bitfit, or Editor.train)."
            )
        moves = tensor.requires_grad or want.requires_grad or name in moving
        if moves or is_sharded(tensor) or tensor.is_meta:
            continue
        if not close(want, tensor):
            raise VerifyError(
                f"the program is not what its history says: {name} was changed outside of training."
            )
    fixed = {n for n, t in new.items() if old[n].requires_grad and not t.requires_grad}
    for adapter in program.adapters:
        own = {n for n in new if n.startswith(f"peftfx.{adapter}.") and old[n].requires_grad}
        own |= {n for n in program.owned.get(adapter, ()) if n in old and old[n].requires_grad}
        if fixed & own and own - fixed:
            raise VerifyError(
                f"{min(fixed & own)} requires no gradients, but the adapter {adapter!r} trains it. "
                "Leave all of an adapter frozen, or none."
            )


def tensors(program: State) -> dict[str, Tensor]:
    return dict([*stored(program.module), *_plain(program).items()])


def _same(x: Tensor, y: Tensor) -> bool:
    if x.is_meta or y.is_meta or is_sharded(x) or same_view(x) == same_view(y):
        return x.shape == y.shape and x.dtype == y.dtype
    x, y = x.detach(), y.detach()
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return torch.equal(x, y) or bool(((x == y) | (x != x) & (y != y)).all())


def close(x: Tensor, y: Tensor) -> bool:
    """Equal up to what another device or number of threads rounds otherwise."""
    if _same(x, y):
        return True
    if x.dtype != y.dtype or x.shape != y.shape or not x.is_floating_point():
        return False
    limit = 16 * torch.finfo(x.dtype).eps * float(x.detach().abs().max())
    return torch.allclose(x.detach(), y.detach(), rtol=0.0, atol=limit, equal_nan=True)
