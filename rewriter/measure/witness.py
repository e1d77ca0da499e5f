"""What a program does, kept to compare with: outputs in both modes, and whether they stay the same.

A witness is taken before a pass plans, so that it also tells of what the pass did to the program
that it was given. It runs on a still copy (see `still`); nothing of the live module is touched.
"""

from __future__ import annotations

import contextlib
import functools
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
from ..graph.walks import settled, stored
from ..program.state import State
from .compare import compare
from .likeness import runs_alike
from .still import Expected, is_modeless, still


@dataclass
class Outputs:
    """What was seen of a program.

    Attributes:
        seen: inputs with outputs in evaluation mode.
        trained: inputs, outputs in training mode, and what random operators ran.
        expected: random operators give their expected value, because the model itself draws random
            numbers in evaluation mode.
    """

    seen: list[tuple[dict[str, Tensor], Any]] = field(
        default_factory=list[tuple[dict[str, Tensor], Any]]
    )
    trained: tuple[dict[str, Tensor], Any, Counter[Any]] | None = None
    expected: bool = False

    def of(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any] | None:
        """What was seen for these inputs."""
        return next((seen for seen in self.seen if _alike(given, seen[0])), None)

    @property
    def size(self) -> int:
        """Bytes of all outputs."""
        leaves = pytree.tree_leaves([*(result for _, result in self.seen), self.trained])
        return sum(t.nbytes for t in leaves if isinstance(t, Tensor))


@dataclass(frozen=True)
class _Copy:
    """A still copy, its tensors by name, and those values that forwards may update."""

    gm: CapturedModule
    held: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    sharded: bool


@dataclass(eq=False)
class Witness:
    """The outputs of a program by its inputs.

    Attributes:
        program: of which it is a witness.
        known: what was seen so far.
    """

    program: State
    known: Outputs = field(default_factory=Outputs)
    ignored: int = 0
    """How many of the outputs that passes have added are left out, from the last on, because the
    program that it is compared with has none."""
    settled: bool = False
    """Whether a second call has given the same."""

    @functools.cached_property
    def _copy(self) -> _Copy:
        updated = state_tensors(self.program.module)
        gm = still(self.program, updated)
        with settled(gm):
            tensors = dict(stored(gm))
            state = {n: tensors[n].clone() for n in updated if n in tensors}
            return _Copy(gm, tensors, state, has_shards(gm))

    @property
    def gm(self) -> CapturedModule:
        """The still copy; made when it is first needed."""
        return self._copy.gm

    @property
    def expected(self) -> bool:
        """Whether random operators give their expected value."""
        return self.known.expected

    def again(self) -> Witness:
        """A witness on the same copy, for as long as that is changed."""
        other = Witness(self.program, ignored=self.ignored)
        other.__dict__["_copy"] = self._copy
        return other

    def expect(self) -> None:
        """Lets random operators give their expected value from now on."""
        self.known = Outputs(expected=True)

    def completed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs that the program takes: those that a pass has dropped with the values that
        they had to have, none that a pass has added."""
        return completed(self.program, inputs)

    def outputs(self, inputs: Mapping[str, Tensor]) -> Any:
        """The outputs in evaluation mode, from the program's own state."""
        given = self.completed(inputs)
        if (seen := self.known.of(given)) is not None:
            return self.shortened(seen[1])
        self.reset()
        self.known.seen.append((given, self._call(given)))
        return self.shortened(self.known.seen[-1][1])

    def has_seen(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the outputs are known already."""
        return self.known.of(self.completed(inputs)) is not None

    def in_training(self, inputs: Mapping[str, Tensor]) -> tuple[Any, Counter[Any]]:
        """The outputs in training mode, and how often each random operator ran, see `Expected`."""
        given = self.completed(inputs)
        known = self.known.trained
        if known is None or not _alike(given, known[0]):
            known = self.known.trained = self._in_training(given)
        _, output, draws = known
        return self.shortened(output), draws

    def _in_training(self, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any, Counter[Any]]:
        if is_modeless(self.gm) and not self.stateful:
            self.outputs(given)
            if (seen := self.known.of(given)) is not None:
                return *seen, Counter()
        with self.training() as mode:
            return given, self.forward(given), mode.draws

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
            return outputs(self.gm, copies) if self._copy.sharded else self.gm(**copies)

    def reset(self) -> None:
        """Puts the state back that the program has."""
        for name, value in self._copy.state.items():
            self._copy.held[name].data.copy_(value)

    @property
    def stateful(self) -> bool:
        """Whether forwards may update stored tensors."""
        return bool(state_tensors(self.program.module))

    def moved(self) -> set[str]:
        """Names of the stored tensors that differ from those of the program, or were written."""
        tensors, state = self._copy.held, self._copy.state
        return self.written() | {n for n, t in state.items() if not equal(tensors[n], t)}

    def written(self) -> set[str]:
        """Names of the stored tensors that were written, but for those that forwards may update."""
        return {
            n for n, t in self._copy.held.items()
            if not t.is_inference() and t._version and n not in self._copy.state
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
    """A witness of the program: a shared one of it, or of one that computes the same, with the
    outputs that it has; or a new one."""
    shared = [w for w in _SHARED.get() if not w.expected]
    same = (w for w in shared if w.program is program or _alike_in_all(w.program, program))
    return next(same, None) or Witness(program)


def _alike_in_all(one: State, other: State) -> bool:
    same = one.spec == other.spec and one.outputs_added == other.outputs_added
    hollow = has_shards(one.module) or has_shards(other.module)
    return same and not hollow and runs_alike(one.module, other.module)


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
    moved = Witness(witness.program, Outputs(expected=witness.expected), witness.ignored)
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
