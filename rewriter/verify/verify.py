"""Contracts and certificates: what a pass promises about the outputs, and what was measured.

Measured on the captured example at several sizes against the program before: in evaluation mode,
called twice, and in training mode with dropout at its expected value. Every output is measured on
its own, in relation to its own largest value; integers have to be equal, where no scores are tied.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..errors import VerifyError
from ..graph.aten import attribute, output_node, placeholders
from ..graph.module import device_of, modes_kept, state_kept
from ..graph.sharded import placed_like, whole
from ..inputs.spec import short_type
from ..measure.choices import tied
from ..measure.compare import TOLERANCE, Gap, compare, figures, floats, gaps, worst
from ..measure.noise import cancelled, levels
from ..measure.steady import quieten, require_steady, trained
from ..measure.still import forward, still
from ..measure.trials import sizes
from ..measure.witness import Witness, aligned, comparable, whole_tensors, witness_of
from ..program.history import Certificate, Contract
from ..program.state import State
from ..program.text import with_names
from .apart import only_branches
from .effect import SHARE, effect
from .intact import marks
from .known import keep, recalled

__all__ = ["Certificate", "Contract", "certify", "compare", "floats", "gaps", "measure"]

CAP = 0.5
"""The most that is put down to rounding, relative to an output's largest value."""


@contextlib.contextmanager
def evaluation(program: State) -> Iterator[None]:
    """Evaluation mode without gradients and compilation; the mode is put back.

    Parameters stop requiring gradients meanwhile, because torch picks the kernel of a product by
    that flag, and the last bit of the result depends on the kernel.
    """
    trained = program.trainable_parameters()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        # A module compiled in place would be compiled again, for inputs that no user gives.
        with (
            modes_kept(program.module),
            state_kept(program.module),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            for module in program.module.modules():
                module.training = False
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def is_meta(program: State) -> bool:
    """Whether any stored tensor has no values."""
    return any(p.is_meta for p in program.module.parameters())


def measure(before: State, after: State) -> dict[str, float]:
    """Largest output difference, absolute and relative to the output's own largest value.

    Raises:
        VerifyError: number, type, dtype or shape of the outputs differ.
    """
    one, other = witness_of(before), witness_of(after)
    if one is other:
        return figures([])
    with comparable(one, other):
        if not (one.settled and other.settled):
            quieten(one, other, sizes(after))
        each = _measured(one, other)
    infinite = {"max_rel": float("inf")} if any(g.values for g in each) else {}
    return {**figures(each), **infinite}


def _measured(before: Witness, after: Witness) -> list[Gap]:
    """The gap of every output, over all sizes; of one that is nothing but rounding, relative to
    the numbers that it is made of."""
    return _quieted(before, _compared(before, after), lambda: _rounding(before.program))


def _quieted(before: Witness, each: list[Gap], moved: Callable[[], list[Gap]]) -> list[Gap]:
    tolerance, gaps = _tolerance(before.program), list(each)
    loud = [i for i, g in enumerate(each) if tolerance < g.relative < math.inf and not g.reason]
    if not loud or not whole_tensors(before.program):
        return gaps
    level, noise = levels(before, sizes(before.program)[0]), moved()
    for i in loud:
        largest = each[i].absolute / each[i].relative
        if level[i] and noise[i].relative > CAP and cancelled(before, largest, level[i]):
            gaps[i] = replace(each[i], relative=each[i].absolute / level[i], noise=True)
    return gaps


def _compared(before: Witness, after: Witness) -> list[Gap]:
    inputs = sizes(after.program)
    each = worst([compare(before.outputs(i), after.outputs(i)) for i in inputs])
    for gap in each:
        if gap.form:
            raise VerifyError(f"the output {gap.name} is another one: {gap.form}.")
    return each


def difference(
    before: State, after: State, data: Iterable[Mapping[str, Tensor]]
) -> tuple[float, float]:
    """Largest output difference on batches, absolute and relative to the output's largest value."""
    modules = [(p, still(p)) for p in (before, after)]
    rounds: list[list[Gap]] = []
    for batch in data:
        both = [
            forward(gm, p.spec.bind((), {n: t for n, t in batch.items() if n in p.spec.names}))
            for p, gm in modules
        ]
        rounds.append(compare(*both))
    largest = figures(worst(rounds))
    return largest["max_abs"], largest["max_rel"]


def _rounding(program: State, seed: int = 0) -> list[Gap]:
    """How far outputs move when every weight moves by one rounding: the network's condition.

    No two ways to compute it in this precision agree better.
    """
    moved = Witness(program)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.gm.parameters():
            if parameter.is_floating_point():
                weight = whole(parameter)
                sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
                step = torch.finfo(weight.dtype).eps * sign.to(weight)
                parameter.data = placed_like(weight * (1 + step), parameter)
    resting = Witness(program)
    quieten(resting, moved, sizes(program))
    return _compared(resting, moved)


def rounding(program: State, seed: int = 0) -> float:
    """The largest of `_rounding`, relative to the output's own largest value."""
    return figures(_rounding(program, seed))["max_rel"]


def bound(program: State, measured: dict[str, float]) -> float:
    """The largest relative difference that rounding explains.

    `TOLERANCE` of the dtype; where `measured` exceeds that, eight times the network's own
    sensitivity to one rounding of every weight, at most `CAP`. It is added to `measured`.
    """
    allowed = _tolerance(program)
    if measured["max_rel"] > allowed:
        measured["rounding"] = rounding(program)
        allowed = _explained(allowed, measured["rounding"])
    return allowed


def _tolerance(program: State) -> float:
    dtypes = {p.dtype for p in program.module.parameters()} or {torch.float32}
    return max(TOLERANCE.get(dtype, 2e-5) for dtype in dtypes)


def _explained(tolerance: float, moved: float) -> float:
    return max(tolerance, min(CAP, 8 * moved))


def certify(
    contract: Contract, before: Witness, after: Witness, again: bool = False
) -> Certificate:
    """Measures a contract.

    Args:
        contract: what is promised.
        before: taken before the pass planned.
        after: of what the pass made.
        again: see `require_steady`.

    Raises:
        VerifyError: it does not hold, or the outputs are not settled.
    """
    if is_meta(after.program):
        return Certificate("unmeasured")
    with comparable(before, after):
        return _certified(contract, before, after, again)


def _certified(contract: Contract, before: Witness, after: Witness, again: bool) -> Certificate:
    again = again and contract.kind == "identity"
    given = require_steady(before, after, sizes(after.program), again)
    each = _measured(before, after)
    kind, on_cpu = contract.kind, device_of(after.gm).type == "cpu"
    if kind in ("identity", "exact") and any(g.relative for g in each):
        if on_cpu:
            before, after = aligned(before), aligned(after)
            each = _measured(before, after)
        # A GPU takes other kernels with a bias, and a fused product is computed as a linear and a
        # sum again where something else is put beside it: both round otherwise.
        if not on_cpu or len(_fused(after)) < len(_fused(before)):
            kind = "bounded"
    if kind == "trainable":
        if spoilt := next((g for g in each if g.spoilt), None):
            raise VerifyError(f"the output {spoilt.name} is not finite any more: {spoilt.spoilt}.")
        return Certificate(kind, figures([g for g in each if not g.values]), given=given)
    limits = _Limits(before.program, contract.limit if kind == "near" else 0.0, kind == "bounded")
    each = _untied(before, after, each, limits, sizes(after.program))
    measured = {**figures(each), **limits.figures(each)}
    _require(kind, each, limits, "")
    if kind == "bounded" and whole_tensors(before.program) and whole_tensors(after.program):
        silent = {i for i, g in enumerate(each) if g.noise}
        measured |= _require_effect(before, after, limits, silent)
    if kind != "near" and whole_tensors(before.program):
        inputs = sizes(after.program)[0]
        each = trained(before, after, inputs, grows=contract.kind != "bounded")
        each = _quieted(before, each, limits.moved)
        with before.training(), after.training():
            each = _untied(before, after, each, limits, [inputs])
        _require(kind, each, limits, " in training mode")
    return Certificate(kind, measured, given=given)


def _fused(witness: Witness) -> list[str]:
    """Calls of branches that compute their linear, too."""
    calls = witness.gm.graph.find_nodes(op="call_module")
    return [n.name for n in calls if "call" in n.meta]


class _Limits:
    """What each output may differ by, relative to its largest value."""

    def __init__(self, program: State, fixed: float, rounded: bool) -> None:
        self.program, self.fixed, self.rounded = program, fixed, rounded
        self._moved: list[Gap] | None = None

    def moved(self) -> list[Gap]:
        """See `_rounding`; measured when first needed."""
        if self._moved is None:
            self._moved = _rounding(self.program)
        return self._moved

    def of(self, index: int, gap: Gap) -> float:
        if not self.rounded:
            return self.fixed
        tolerance = _tolerance(self.program)
        if gap.relative <= tolerance:
            return tolerance
        return _explained(tolerance, self.moved()[index].relative)

    def figures(self, each: Sequence[Gap]) -> dict[str, float]:
        """The network's sensitivity, where it was needed."""
        for index, gap in enumerate(each):
            self.of(index, gap)
        return {} if self._moved is None else {"rounding": figures(self._moved)["max_rel"]}


def _untied(
    before: Witness,
    after: Witness,
    each: Sequence[Gap],
    limits: _Limits,
    rounds: Sequence[Mapping[str, Tensor]],
) -> list[Gap]:
    """The gaps without integers that differ only where the scores they chose from are tied."""
    left: list[Gap] = []
    for index, gap in enumerate(each):
        if gap.discrete and gap.values and whole_tensors(before.program):
            pairs = [(before.completed(i), after.completed(i)) for i in rounds]
            limit = max(limits.fixed, limits.of(index, replace(gap, relative=0.0)))
            if limit and all(tied(before.gm, after.gm, index, p, limit) for p in pairs):
                gap = replace(gap, relative=0.0, values="")
        left.append(gap)
    return left


def _require(kind: str, each: Sequence[Gap], limits: _Limits, where: str) -> None:
    for index, gap in enumerate(each):
        if gap.reason:
            raise VerifyError(
                f"the contract {kind!r} does not hold{where}: the output {gap.name}: {gap.reason}. "
                "The program is unchanged."
            )
        allowed = limits.of(index, gap)
        if gap.relative > allowed:
            raise VerifyError(
                f"the contract {kind!r} does not hold{where}: outputs differ by "
                f"{gap.absolute:.3g} ({gap.relative:.3g} of the largest value of {gap.name}), "
                f"allowed is {allowed:.3g}. The program is unchanged."
            )


def _require_effect(
    before: Witness, after: Witness, limits: _Limits, silent: Collection[int]
) -> dict[str, float]:
    """Holds a rewriting of branches to what they contribute, where that is more than rounding.

    `silent` are the outputs that are nothing else.
    """
    inputs = sizes(after.program)[0]
    seen = effect(before, after, inputs, silent, _without_branches(before, after, inputs))
    if not seen or seen["error"] <= SHARE * seen["effect"]:
        return {}
    moved = [g for i, g in enumerate(limits.moved()) if i not in silent]
    noise = math.sqrt(sum(g.error / g.size for g in moved if g.size))
    # Rounding moves outputs in all directions, so little of it is along what the branches add.
    share = SHARE + noise / (4 * seen["effect"])
    off = abs(seen["kept"] - 1) > share and seen["effect"] > noise / 2
    if off or seen["error"] > max(SHARE * seen["effect"], 2 * noise):
        raise VerifyError(
            f"the contract 'bounded' does not hold: of what the branches contribute to the outputs "
            f"({seen['effect']:.3g} of their norm; rounding moves them by {noise:.3g}), "
            f"{seen['kept']:.0%} are left, with a difference of {seen['error']:.3g}. The program "
            "is unchanged."
        )
    return {"outputs_kept": seen["kept"]}


def _without_branches(before: Witness, after: Witness, inputs: Mapping[str, Tensor]) -> Any:
    """What a program gives without any of its branches, as far as that is known: the outputs of the
    captured one, where all branches are gone and there was nothing else."""
    program = before.program
    if after.program.attachments or program.base is program or not only_branches(program):
        return None
    bare = recalled(program.base, marks(program.base))
    witness = bare.witness
    try:
        known = witness.has_seen(inputs) and not witness.expected
        return witness.outputs(inputs) if known else None
    finally:
        keep(bare)


def _type(program: State, node: Node) -> str:
    """`f32[batch, 4]`: what a node's value is."""
    val = node.meta["val"]
    return with_names(short_type(val.dtype, val.shape), program.symbols)


def check_graph(program: State) -> None:
    """Structural checks: the graph lints and every stored tensor it names exists.

    Raises:
        VerifyError: it does not, or a state becomes another type of value.
    """
    gm = program.module
    try:
        gm.graph.lint()
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                attribute(gm, str(node.target))
    except (RuntimeError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VerifyError(f"the graph is malformed: {first}") from error
    leaves: list[Any] = tree_leaves(output_node(gm).args[0])
    taken = placeholders(gm)
    for name, leaf in zip(reversed(program.outputs_added), reversed(leaves), strict=False):
        nodes: tuple[Any, Any] = taken.get(name, leaf), leaf
        both = [_type(program, n) for n in nodes]
        if both[0] != both[1]:
            raise VerifyError(f"the state {name!r} is {both[0]}, but becomes {both[1]}.")
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for attachment in program.attachments:
        if attachment.path not in called:
            raise VerifyError(f"the branch {attachment.path} is attached but never called.")
