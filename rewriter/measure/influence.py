"""What may not influence what: no sample of a batch another, no token of a causal model an earlier
one. Measured on a program as if it had trained, since initial values hide what branches do.

One place of the inputs is changed, and the outputs at the others are looked at. Where the captured
model itself lets them move, a branch may, too.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import VerifyError
from ..graph.aten import output_node, shape
from ..graph.module import device_of
from ..inputs.changed import altered
from ..program.state import State
from .compare import Gap, compare, keyed_leaves
from .witness import Witness

SAMPLES, TOKENS = "samples", "tokens"

_SAID = {
    SAMPLES: "samples of a batch influence one another: what is changed in the last one along "
    "{size!r} moves the others'",
    TOKENS: "earlier tokens see later ones, which those of the captured model do not: what is "
    "changed at the last one along {size!r} moves the earlier ones'",
}


@dataclass(frozen=True)
class Change:
    """Inputs that are changed at the last place along one size.

    Attributes:
        kind: `SAMPLES` or `TOKENS`.
        size: the name of that size.
        before, after: the inputs.
    """

    kind: str
    size: str
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


def require_apart(
    after: Witness, inputs: Mapping[str, Tensor], departures: Collection[str], what: str
) -> None:
    """Raises VerifyError where samples or tokens influence what they do not in the captured model.

    Args:
        after: of a program whose branches do something.
        inputs: that it is called with, of two samples and two tokens at least.
        departures: the kinds that the passes say they do not keep.
        what: the pass, for messages.
    """
    given, limit = after.completed(inputs), noise_limit(after)
    base = after.program.base

    @functools.cache
    def resting() -> Witness:
        witness = Witness(base)
        if after.expected:
            witness.expect()
        return witness

    for change in _changes(base, inputs):
        own = _moved(base, resting, change, after.expected)
        within = {n: r for n, r in own.items() if r <= limit}
        if change.kind in departures or not within:
            continue
        gaps = _elsewhere(after, given, after.completed(change.after), change.size)
        for name in within.keys() & gaps.keys():
            gap = gaps[name]
            if gap.relative <= max(limit, 8 * within[name]):
                continue
            raise VerifyError(
                f"{what}: {_SAID[change.kind].format(size=change.size)}, {name} by "
                f"{gap.relative:.3g} of its largest value. It shows once the branches have "
                "trained. Look for means, norms, sums or shifts over that axis; if it is meant, "
                f"let the pass's `departures` hold {change.kind!r}."
            )


def noise_limit(witness: Witness) -> float:
    """What two computations of one value may differ by, relative to the largest.

    Places that are not changed are computed as before, bit for bit on a CPU, unless their number
    depends on the others (experts).
    """
    dtypes = {p.dtype for p in witness.gm.parameters() if p.is_floating_point()}
    coarse = max((torch.finfo(d).eps for d in dtypes), default=0.0)
    fine = 64 * torch.finfo(torch.float32).eps
    return max(fine, 2 * coarse, 1e-3 if device_of(witness.gm).type != "cpu" else 0.0)


def _changes(base: State, inputs: Mapping[str, Tensor]) -> list[Change]:
    """The inputs with other values in the last sample, and at the last token, size by size."""
    changes: list[Change] = []
    for size, count in base.spec.sizes_of(inputs).items():
        if count < 2:
            continue
        kind = SAMPLES if size in base.spec.of_kind("batch") else TOKENS
        after = dict(inputs)
        for item in base.spec.inputs:
            axes = [a for a, s in enumerate(item.shape) if s == size]
            if item.name in inputs and axes:
                after[item.name] = altered(inputs[item.name], axes, count - 1)
        if any(t is not inputs[n] for n, t in after.items()):
            changes.append(Change(kind, size, inputs, after))
    return changes


_Key = tuple[str, bool, tuple[tuple[str, tuple[int, ...]], ...]]
_KNOWN: weakref.WeakKeyDictionary[State, dict[_Key, dict[str, float]]] = weakref.WeakKeyDictionary()
"""Of captured programs: what they themselves do at a change."""


def _moved(
    base: State, resting: Callable[[], Witness], change: Change, expected: bool
) -> dict[str, float]:
    """By output, what a change moves elsewhere in the captured model; none where that fails for
    such values, so that nothing can be told."""
    shapes = tuple((n, tuple(t.shape)) for n, t in change.before.items())
    key = change.size, expected, shapes
    known = _KNOWN.setdefault(base, {})
    if key not in known:
        witness = resting()
        before, after = witness.completed(change.before), witness.completed(change.after)
        try:
            gaps = _elsewhere(witness, before, after, change.size)
        except Exception:  # noqa: BLE001 - whatever the model raises for such values
            gaps = {}
        known[key] = {n: g.relative for n, g in gaps.items()}
    return known[key]


def _elsewhere(
    witness: Witness, before: Mapping[str, Tensor], after: Mapping[str, Tensor], size: str
) -> dict[str, Gap]:
    """The gap of each output along that size, but at its last place."""
    axes = _axes(witness.program, size)
    want, got = witness.outputs(before), witness.outputs(after)
    kept = [_front(o, axes) for o in (want, got)]
    return {g.name: g for g in compare(*kept) if not g.discrete}


def _axes(program: State, size: str) -> list[int | None]:
    """Of each output, the axis that consists of places along a size; None if there is none."""
    axes: list[int | None] = []
    for leaf in pytree.tree_leaves(output_node(program.module).args[0]):
        names = [re.findall(r"[A-Za-z_]\w*", str(s)) for s in shape(leaf) or ()]
        along = [
            a for a, each in enumerate(names)
            if each and all(program.symbols.get(n) == size for n in each)
        ]  # fmt: skip
        axes.append(along[0] if along else None)
    return axes


def _front(output: Any, axes: list[int | None]) -> dict[str, Tensor]:
    """The outputs that have such an axis, without its last place."""
    leaves = keyed_leaves(output)
    if len(leaves) != len(axes):  # the outputs hold more than tensors of the graph
        return {}
    return {
        pytree.keystr(path): leaf.narrow(axis, 0, leaf.shape[axis] - 1)
        for (path, leaf), axis in zip(leaves, axes, strict=True)
        if axis is not None and isinstance(leaf, Tensor) and leaf.shape[axis] > 1
    }
