"""Contracts and certificates: what a pass promises about the outputs, and what was measured.

Measured on the captured example at two sizes, in evaluation mode, against the program before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..aten import attribute
from ..errors import VerifyError
from ..module import device_of, modes_kept, state_kept
from ..sharded import outputs, placed_like, whole

if TYPE_CHECKING:
    from ..program import Program

TOLERANCE = {
    torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1,
}  # fmt: skip
"""Difference that a bounded contract allows in any case, relative to the largest output."""


@dataclass(frozen=True)
class Contract:
    """A promise.

    Attributes:
        kind: `identity` (outputs stay bit-equal at first, new parameters train), `exact`
            (bit-equal), `bounded` (equal up to rounding, see `bound`), `near` (within `limit` of
            the largest output), `trainable` (outputs change; what trains is declared).
        limit: for `near`.
    """

    kind: str
    limit: float = 0.0


@dataclass(frozen=True)
class Certificate:
    """A contract with its measured figures.

    Attributes:
        kind: the contract's kind, or `unmeasured` (no values on the meta device).
        measured: largest absolute difference, and that relative to the largest output.
        holds: whether the promise was kept.
    """

    kind: str
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    holds: bool = True

    @property
    def text(self) -> str:
        """One line for reports."""
        if not self.measured:
            return self.kind
        figures = ", ".join(f"{k} {v:.3g}" for k, v in self.measured.items())
        return f"{self.kind}: {figures}"

    def __str__(self) -> str:
        return self.text if self.holds else f"BROKEN {self.text}"


def sizes(program: Program) -> list[dict[str, Tensor]]:
    """The captured example, cut or repeated to two small sizes within the program's ranges."""
    made: list[dict[str, Tensor]] = []
    for batch, tokens in ((2, 12), (3, 7)):
        wanted: dict[str, int] = {}
        for name, (low, high) in program.spec.ranges.items():
            size = batch if name.startswith("batch") else tokens
            wanted[name] = max(low, min(size, high) if high is not None else size)
        inputs = program.spec.resize(program.sample, **wanted)
        made.append({n: t.to(device_of(program.module)) for n, t in inputs.items()})
    return made


@contextlib.contextmanager
def evaluation(program: Program) -> Iterator[None]:
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


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of any output structure."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def is_meta(program: Program) -> bool:
    """Whether any stored tensor has no values."""
    return any(p.is_meta for p in program.module.parameters())


def gaps(want: list[Tensor], got: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of tensors of equal shapes, and largest finite value."""
    worst, largest = 0.0, 0.0
    for x, y in zip(want, got, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        gap = (x.to(wide) - y.to(wide)).abs()
        gap = torch.where(torch.isnan(x) & torch.isnan(y) | (x == y), 0.0, gap)
        if not gap.numel():
            continue
        worst = max(worst, float(gap.nan_to_num(float("inf")).max()))
        finite = x[torch.isfinite(x)]
        largest = max(largest, float(finite.abs().max()) if finite.numel() else 0.0)
    return worst, largest


def measure(before: Program, after: Program) -> dict[str, float]:
    """Largest output difference, absolute and relative to the largest output."""
    worst, largest = 0.0, 0.0
    with evaluation(before), evaluation(after):
        for inputs in sizes(after):
            a = floats(outputs(before.module, _completed(before, inputs)))
            b = floats(outputs(after.module, inputs))
            if len(a) != len(b):
                raise VerifyError(f"the pass changes the number of outputs: {len(a)} -> {len(b)}.")
            for x, y in zip(a, b, strict=True):
                if x.shape != y.shape:
                    raise VerifyError(
                        f"an output changes from {tuple(x.shape)} to {tuple(y.shape)}."
                    )
            here = gaps(a, b)
            worst, largest = max(worst, here[0]), max(largest, here[1])
    return {"max_abs": worst, "max_rel": worst / largest if largest else worst}


def difference(
    before: Program, after: Program, data: Iterable[Mapping[str, Tensor]]
) -> tuple[float, float]:
    """Largest output difference on batches, absolute and relative to the largest output."""
    worst, largest = 0.0, 0.0

    def run(program: Program, batch: Mapping[str, Tensor]) -> list[Tensor]:
        taken = {n: t for n, t in batch.items() if n in program.spec.names}
        return floats(outputs(program.module, program.spec.bind((), taken)))

    with evaluation(before), evaluation(after):
        for batch in data:
            here = gaps(run(before, batch), run(after, batch))
            worst, largest = max(worst, here[0]), max(largest, here[1])
    return worst, worst / largest if largest else worst


def rounding(program: Program, seed: int = 0) -> float:
    """How far outputs move, relative to the largest, when every weight moves by one rounding.

    The condition of the network: no two ways to compute it in this precision agree better.
    """
    moved = program.fork()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.module.parameters():
            if parameter.is_floating_point():
                held = whole(parameter)
                sign = torch.randint(0, 2, held.shape, generator=generator) * 2 - 1
                step = torch.finfo(held.dtype).eps * sign.to(held)
                parameter.data = placed_like(held * (1 + step), parameter)
    return measure(program, moved)["max_rel"]


def bound(program: Program, measured: dict[str, float]) -> float:
    """The largest relative difference that rounding explains.

    `TOLERANCE` of the dtype; where `measured` exceeds that, eight times the network's own
    sensitivity to one rounding of every weight, which is then added to `measured`.
    """
    dtypes = {p.dtype for p in program.module.parameters()} or {torch.float32}
    allowed = max(TOLERANCE.get(dtype, 2e-5) for dtype in dtypes)
    if measured["max_rel"] > allowed:
        measured["rounding"] = rounding(program)
        allowed = max(allowed, 8 * measured["rounding"])
    return allowed


def _completed(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that a program takes: those that a pass has dropped with the values that they had
    to have, none that a pass has added."""
    missing = [i for i in program.spec.inputs if i.name not in inputs]
    if not missing:
        return {i.name: inputs[i.name] for i in program.spec.inputs}
    example = program.spec.example(None, **program.spec.sizes_of(inputs))
    return {
        i.name: inputs.get(i.name, example[i.name].to(device_of(program.module)))
        for i in program.spec.inputs
    }


def certify(contract: Contract, before: Program, after: Program) -> Certificate:
    """Measures a contract.

    Raises:
        VerifyError: it does not hold.
    """
    if is_meta(after):
        return Certificate("unmeasured")
    measured = measure(before, after)
    limits = {
        "identity": 0.0, "exact": 0.0, "near": contract.limit, "trainable": float("inf"),
    }  # fmt: skip
    kind, on_cpu = contract.kind, device_of(after.module).type == "cpu"
    if kind in ("identity", "exact") and measured["max_rel"] and not on_cpu:
        kind = "bounded"  # a GPU takes other kernels with a bias, which round otherwise
    allowed = bound(before, measured) if kind == "bounded" else limits[kind]
    holds = measured["max_rel"] <= allowed
    certificate = Certificate(kind, measured, holds)
    if not holds:
        raise VerifyError(
            f"the contract {kind!r} does not hold: outputs differ by "
            f"{measured['max_abs']:.3g} ({measured['max_rel']:.3g} of the largest output), allowed "
            f"is {allowed:.3g}. The program is unchanged."
        )
    return certificate


def check_graph(program: Program) -> None:
    """Structural checks: the graph lints and every stored tensor it names exists.

    Raises:
        VerifyError: it does not.
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
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for attachment in program.attachments:
        if attachment.path not in called:
            raise VerifyError(f"the branch {attachment.path} is attached but never called.")


def verify_program(program: Program) -> list[Certificate]:
    """See `Program.verify`: replays the history from the base and measures each step again."""
    from .pipeline import replay_steps

    check_graph(program)
    found: list[Certificate] = []
    if is_meta(program):
        return [Certificate("unmeasured") for _ in program.history]
    last = program.base
    for record, before, after in replay_steps(program):
        found.append(certify(record.applied.promise(), before, after))
        last = after
    if program.history:
        measured = measure(last, program)
        allowed = bound(program, measured)
        if measured["max_rel"] > allowed:
            raise VerifyError(
                "the program is not what its history says: replaying the history gives outputs "
                f"that differ by {measured['max_rel']:.3g} of the largest output (allowed "
                f"{allowed:.3g}). A tensor was changed outside of training, or a merge is wrong."
            )
        found.append(Certificate("replayed", measured))
    return found
