"""What each branch does by itself, once it does something: the same in both modes, and with
gradients that are its derivative.

A branch runs on what it is given in a program, apart from the network around it, which may differ
in training (batch statistics) and have operators without a derivative of their own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import VerifyError
from ..graph.aten import inputs
from .compare import compare, floats
from .still import Expected
from .watch import branches, place
from .witness import Witness

MODES, GRADIENTS = "modes", "gradients"

_STEPS = (1e-3, 1e-4, 1e-2)
"""Of central differences, relative to an operand's size. A branch that steps (a top-k) may do so
within one of them, not within all."""
_SLACK = 0.02
"""Share of a derivative that its difference may be off, in float32."""
_USUAL = 1e4
"""What is larger is no activation: a mask."""


@dataclass
class Call:
    """One call of a branch.

    Attributes:
        leaves: its operands, flat.
        moving: which of them are floating-point numbers that depend on the program's inputs.
        form: how to make arguments of the leaves.
        output: what it gave.
    """

    leaves: list[Any]
    moving: list[int]
    form: Any
    output: Any = None

    def of(self, module: nn.Module, moved: Mapping[int, Tensor] | None = None) -> Any:
        """What the module returns, with other values for some of the operands."""
        given = [(moved or {}).get(i, leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(given, self.form)
        return module(*args, **kwargs)


@contextlib.contextmanager
def calls(witness: Witness, paths: Collection[str]) -> Iterator[dict[str, Call]]:
    """Collects the first call of each branch that happens meanwhile, by path.

    Args:
        witness: of a program with branches, which is called inside of the context.
        paths: of the branches.
    """
    seen: dict[str, Call] = {}
    moving = _moving(witness, paths)
    with contextlib.ExitStack() as hooks:
        for path, module in branches(witness, paths).items():

            def enter(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                if path not in seen:
                    leaves, form = pytree.tree_flatten((args, kwargs))
                    some = [i for i in moving[path] if _is_float(leaves[i])]
                    operands = [t.clone() if i in some else t for i, t in enumerate(leaves)]
                    seen[path] = Call(operands, some, form)

            def leave(_: nn.Module, given: Any, output: Any, path: str = path) -> None:
                if seen[path].output is None:
                    seen[path].output = output

            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield seen


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _moving(witness: Witness, paths: Collection[str]) -> dict[str, list[int]]:
    """By path of the branch, which leaves of its arguments depend on inputs of the program."""
    depends: dict[Any, bool] = {}
    for node in witness.gm.graph.nodes:
        depends[node] = node.op == "placeholder" or any(depends[n] for n in inputs(node))
    return {
        str(node.target): [
            i for i, a in enumerate(pytree.tree_leaves((node.args, node.kwargs)))
            if depends.get(a, False)
        ]
        for node in reversed(witness.gm.graph.nodes)
        if node.op == "call_module" and node.target in paths
    }  # fmt: skip


def require_faithful(
    witness: Witness, path: str, call: Call, limit: float, departures: Collection[str], what: str
) -> None:
    """Raises VerifyError if a branch differs between its modes, or cuts gradients.

    Args:
        witness: of a program whose branches do something.
        path: of the branch.
        call: one of its calls.
        limit: what its modes may differ by, see `influence.noise_limit`.
        departures: what its pass says of it: `MODES`, `GRADIENTS`.
        what: the pass, for messages.
    """
    module = witness.gm.get_submodule(path)
    said = f"{what}: the branch {place(witness, path)}"
    if MODES not in departures:
        _require_modes(module, call, limit, said)
    if GRADIENTS not in departures and call.moving:
        _require_gradients(module, call, said)


def _require_modes(module: nn.Module, call: Call, limit: float, said: str) -> None:
    with torch.no_grad():
        want = call.of(module)
        module.train()
        try:
            with Expected():
                got = call.of(module)
        finally:
            module.eval()
    gaps = compare(want, got)
    if any(g.reason or g.relative > limit for g in gaps):
        most = max(g.relative for g in gaps)
        raise VerifyError(
            f"{said} computes something else in training than in evaluation, with every dropout "
            f"off: by {most:.3g} of its largest value. It shows once the branch has trained. Let "
            f"both compute the same, or let the pass's `departures` hold {MODES!r}."
        )


def _require_gradients(module: nn.Module, call: Call, said: str) -> None:
    """Compares a directional derivative with what autograd says of it, in float32 at least."""
    lost = 1.0
    for attempt, step in enumerate(_STEPS):
        lost = _lost(module, call, step, attempt)
        if lost <= _SLACK:
            return
    raise VerifyError(
        f"{said} does not give back the gradient of what it computes: of its derivative along its "
        f"operands, {lost:.0%} are missing, so what lies below would train on wrong gradients, or "
        "on none. Look for detach(), no_grad() or rounding in its forward; if it is meant, let "
        f"the pass's `departures` hold {GRADIENTS!r}."
    )


def _lost(module: nn.Module, call: Call, step: float, seed: int) -> float:
    """The share of a derivative along random directions that autograd does not give; 0 where the
    branch chooses otherwise within the step (its integers differ), so that there is none.

    With `d` the central difference of the outputs along directions `u`, the gradient of their
    product with `d` has the product `d d` with `u`.
    """
    module, call = _widened(module, call)
    generator = torch.Generator().manual_seed(seed)
    along = {i: _direction(call.leaves[i], generator) for i in call.moving}
    with torch.no_grad():
        both = [
            call.of(module, {i: call.leaves[i] + s * u for i, u in along.items()})
            for s in (step, -step)
        ]
    if any(g.discrete and g.reason for g in compare(*both)):
        return 0.0
    ends = [floats(each) for each in both]
    slopes = [(p - m) / (2 * step) for p, m in zip(*ends, strict=True)]
    slopes = [torch.nan_to_num(d, 0.0, 0.0, 0.0) for d in slopes]
    size = sum(float(d.double().square().sum()) for d in slopes)
    level = sum(float(torch.nan_to_num(p).double().square().sum()) for p in ends[0])
    rounding = 64 * torch.finfo(torch.float32).eps / (2 * step)
    if size <= rounding**2 * level:
        return 0.0
    leaves = {i: call.leaves[i].detach().clone().requires_grad_() for i in along}
    with torch.enable_grad():
        outputs = floats(call.of(module, leaves))
        pairs = [(o, d) for o, d in zip(outputs, slopes, strict=True) if o.requires_grad]
        if not pairs:
            return 1.0
        tensors, weights = zip(*pairs, strict=True)
        grads: Any = torch.autograd.grad(tensors, list(leaves.values()), weights, allow_unused=True)
    given = sum(
        float((g * u).double().sum())
        for g, u in zip(grads, along.values(), strict=True) if g is not None
    )  # fmt: skip
    return abs(size - given) / size


def _direction(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the size of x where that is one of activations, else zero."""
    usual = x.isfinite() & (x.abs() < _USUAL)
    size = torch.where(usual, x, 0.0).square().sum().div(usual.sum().clamp(min=1)).sqrt()
    noise = torch.randn(x.shape, generator=generator).to(x)
    return torch.where(usual, noise * torch.where(size > 0, size, 1.0), 0.0)


def _widened(module: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """A branch and its operands in float32 at least."""

    def wide(leaf: Any) -> Any:
        return leaf.to(torch.promote_types(leaf.dtype, torch.float32)) if _is_float(leaf) else leaf

    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in tensors):
        module = copy.deepcopy(module).float()
    return module, Call([wide(leaf) for leaf in call.leaves], call.moving, call.form)
