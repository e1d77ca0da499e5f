"""What a program does, kept to compare with: outputs in both modes, and whether they stay the same.

A witness is taken before a pass plans, so that it also tells of what the pass did to the program
that it was given. It runs on a still copy (see `still`); nothing of the live module is touched.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..graph.module import CapturedModule, device_of, state_tensors
from ..graph.output_class import shortened
from ..graph.sharded import has_shards, is_sharded, outputs
from ..program.state import State
from .compare import compare
from .still import Expected, still


@dataclass(eq=False)
class Witness:
    """The outputs of a program by its inputs.

    Attributes:
        program: of which it is a witness.
        gm: the still copy.
        expected: random operators give their expected value, because the model itself draws random
            numbers in evaluation mode.
    """

    program: State
    gm: CapturedModule = field(init=False)
    expected: bool = False
    ignored: int = 0
    """How many of the outputs that passes have added are left out, from the last on, because the
    program that it is compared with has none."""

    def __post_init__(self) -> None:
        updated = state_tensors(self.program.module)
        self.gm = still(self.program, updated)
        held = self._held = dict(self.gm.named_buffers()) | dict(self.gm.named_parameters())
        self._state = {n: held[n].clone() for n in updated if n in held}
        self._sharded = has_shards(self.gm)
        self._seen: list[tuple[dict[str, Tensor], Any]] = []
        self._trained: tuple[dict[str, Tensor], Any, Counter[Any]] | None = None

    def again(self) -> Witness:
        """A witness on the same copy, for as long as that is changed."""
        other = copy.copy(self)
        other.forget()
        return other

    def completed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs that the program takes: those that a pass has dropped with the values that
        they had to have, none that a pass has added."""
        return completed(self.program, inputs)

    def outputs(self, inputs: Mapping[str, Tensor]) -> Any:
        """The outputs in evaluation mode, from the program's own state."""
        given = self.completed(inputs)
        if (seen := self._of(given)) is not None:
            return self.shortened(seen[1])
        self.reset()
        self._seen.append((given, self._call(given)))
        return self.shortened(self._seen[-1][1])

    def has_seen(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the outputs are known already."""
        return self._of(self.completed(inputs)) is not None

    def _of(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any] | None:
        return next((seen for seen in self._seen if _alike(given, seen[0])), None)

    def in_training(self, inputs: Mapping[str, Tensor]) -> tuple[Any, Counter[Any]]:
        """The outputs in training mode, and how often each random operator ran, see `Expected`."""
        given = self.completed(inputs)
        if self._trained is None or not _alike(given, self._trained[0]):
            with self.training() as mode:
                self._trained = given, self.forward(given), mode.draws
        _, output, draws = self._trained
        return self.shortened(output), draws

    def call(self, given: Mapping[str, Tensor]) -> Any:
        """The outputs of one more call, in the mode and state that the copy is in."""
        return self.shortened(self._call(given))

    def shortened(self, output: Any) -> Any:
        """Outputs without those that are `ignored`."""
        return shortened(output, self.ignored)

    def _call(self, given: Mapping[str, Tensor]) -> Any:
        with Expected() if self.expected else contextlib.nullcontext():
            return self.forward(given)

    def forward(self, given: Mapping[str, Tensor]) -> Any:
        """What the copy returns for a copy of all inputs, without gradients."""
        copies = {n: t.clone() for n, t in given.items()}
        with torch.no_grad():
            return outputs(self.gm, copies) if self._sharded else self.gm(**copies)

    def reset(self) -> None:
        """Puts the state back that the program has."""
        held = self._held
        for name, value in self._state.items():
            held[name].data.copy_(value)

    @property
    def stateful(self) -> bool:
        """Whether forwards may update stored tensors."""
        return bool(self._state)

    @property
    def size(self) -> int:
        """Bytes of the outputs that it has."""
        outputs = [result for _, result in self._seen] + [self._trained]
        return sum(t.nbytes for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))

    def forget(self) -> None:
        """Drops what was computed."""
        self._seen, self._trained = [], None

    def moved(self) -> set[str]:
        """Names of the stored tensors that differ from those of the program, or were written."""
        held = self._held
        return self.written() | {n for n, t in self._state.items() if not equal(held[n], t)}

    def written(self) -> set[str]:
        """Names of the stored tensors that were written, but for those that forwards may update."""
        return {
            n for n, t in self._held.items()
            if not t.is_inference() and t._version and n not in self._state
        }  # fmt: skip

    @contextlib.contextmanager
    def training(self) -> Iterator[Expected]:
        """Lets `gm` be in training mode, with its random operators at their expected value."""
        self.reset()
        self.gm.train()
        try:
            with Expected() as mode:
                yield mode
        finally:
            self.gm.eval()
            self.reset()


def _alike(given: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(t, known[n]) for n, t in given.items())


_SHARED: ContextVar[tuple[Witness, ...]] = ContextVar("_SHARED", default=())


@contextlib.contextmanager
def sharing(*witnesses: Witness) -> Iterator[None]:
    """Lets `witness_of` give these, for programs that are as they were when they were taken."""
    token = _SHARED.set(witnesses)
    try:
        yield
    finally:
        _SHARED.reset(token)


def witness_of(program: State) -> Witness:
    """A witness of the program: one that is shared, with the outputs that it has, or a new one."""
    shared = (w for w in _SHARED.get() if w.program is program and not w.expected)
    return next(shared, None) or Witness(program)


@contextlib.contextmanager
def comparable(one: Witness, other: Witness) -> Iterator[None]:
    """Lets two witnesses give only the outputs meanwhile that both programs have."""
    names = [w.program.outputs_added for w in (one, other)]
    shared = next((i for i, (a, b) in enumerate(zip(*names, strict=False)) if a != b), None)
    shared = min(map(len, names)) if shared is None else shared
    try:
        for witness, added in zip((one, other), names, strict=True):
            witness.ignored = len(added) - shared
        yield
    finally:
        one.ignored = other.ignored = 0


_ALIGNED = 64
"""Bytes; what torch allocates on a CPU begins at multiples of it."""


def aligned(witness: Witness) -> Witness:
    """A witness of the same program with tensors where torch would allocate them: how a product
    rounds depends on where in memory its operands lie, and weights mapped from files lie elsewhere
    than what is computed of them."""
    moved = Witness(witness.program, witness.expected, witness.ignored)
    for parameter in moved.gm.parameters():
        if not is_sharded(parameter) and parameter.data_ptr() % _ALIGNED:
            parameter.data = parameter.data.clone()
    return moved


def completed(program: State, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See `Witness.completed`."""
    spec = program.spec
    if all(i.name in inputs for i in spec.inputs):
        return {i.name: inputs[i.name] for i in spec.inputs}
    example = spec.example(None, **spec.sizes_of(inputs))
    device = device_of(program.module)
    return {i.name: inputs.get(i.name, example[i.name].to(device)) for i in spec.inputs}


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN included."""
    return x.dtype == y.dtype and x.shape == y.shape and not different(x, y)


def different(want: Any, got: Any) -> str:
    """The first of two programs' outputs that is not equal, and how; empty if all are."""
    for gap in compare(want, got):
        if gap.relative or gap.reason:
            return f"{gap.name} {gap.reason or f'by {gap.relative:.3g} of its largest value'}"
    return ""


def repeats(witness: Witness, inputs: Mapping[str, Tensor]) -> str:
    """Why a second call on equal inputs does not give the same; empty if it does.

    Compares with what the first call gave when the witness was taken, so a change of the program
    since then counts as well.
    """
    first = witness.outputs(inputs)
    given = witness.completed(inputs)
    if witness.stateful:  # back to where the first call left it
        witness.reset()
        witness.call(given)
    second = witness.call(given)
    if not (gap := different(first, second)):
        return ""
    if device_of(witness.gm).type != "cpu" and _rounded(first, second):
        return ""
    witness.reset()
    third = witness.call(given)
    if not different(second, third) and not witness.moved():
        return f"changed: {gap}"
    with Expected() as mode:
        witness.reset()
        once = witness.forward(given)
        witness.reset()
        if mode.draws and not different(once, witness.forward(given)):
            return f"random: {gap}"
    return f"drifts: {gap}"


def _rounded(x: Any, y: Any) -> bool:
    # Sums by atomic additions come in any order on a GPU.
    return all(g.relative <= 1e-3 and not g.reason for g in compare(x, y))


def whole_tensors(program: State) -> bool:
    """Whether no stored tensor is sharded over ranks."""
    return not any(is_sharded(p) for p in program.module.parameters())
