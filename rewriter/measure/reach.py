"""Whether gradients reach what a pass has made trainable."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from ..graph.aten import placeholders
from .compare import floats
from .watch import require_backward
from .witness import Witness


def unreached(
    witness: Witness, names: Collection[str], inputs: Mapping[str, Tensor], what: str = "the pass"
) -> dict[str, str]:
    """The named parameters without a gradient after one backward in training mode, with the reason.

    A gradient of zero is one: B of a LoRA is zero at first, so A gets none yet.

    Args:
        witness: of the program.
        names: of the parameters.
        inputs: that it is called with.
        what: the pass, for messages.

    Returns:
        name -> `model` if no gradient reaches that place of the graph at all (the model detaches
        it, or makes integers of it), else `branch`.

    Raises:
        VerifyError: the backward of a branch fails.
    """
    parameters = dict(witness.gm.named_parameters())
    wanted = {n: parameters[n] for n in names if n in parameters}
    given = witness.completed(inputs)
    with _trained(witness, wanted):
        output = witness.gm(**given)
        try:
            grads = _gradients(output, list(wanted.values()))
        except Exception:
            require_backward(witness, inputs, what)
            raise
        missing = [n for n, g in zip(wanted, grads, strict=True) if g is None]
        if not missing:
            return {}
        places = {str(n.target) for n in witness.gm.graph.nodes if n.op == "call_module"}
        of = {n: next((p for p in places if n.startswith(f"{p}.")), "") for n in missing}
        run = _Sources(witness.gm, set(of.values()))
        result = run.run(*(given[n] for n in placeholders(witness.gm)), enable_io_processing=False)
        flags = _gradients(result, [t for t, _ in run.sources])
        live = {path for (_, path), g in zip(run.sources, flags, strict=True) if g is not None}
    return {n: "branch" if of[n] in live else "model" for n in missing}


class _Sources(Interpreter):
    """Adds a leaf of zeros to what modules return, to see whether a gradient comes back there."""

    def __init__(self, gm: Any, paths: set[str]) -> None:
        super().__init__(gm)
        self.paths = paths
        self.sources: list[tuple[Tensor, str]] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_module" or str(n.target) not in self.paths:
            return result

        def tap(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            source = torch.zeros_like(value, requires_grad=True)
            self.sources.append((source, str(n.target)))
            return value + source

        return pytree.tree_map(tap, result)


@contextlib.contextmanager
def _trained(witness: Witness, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """The witness in training mode, with gradients for some of its parameters alone."""
    with witness.training(), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)


def _gradients(output: Any, parameters: list[Any]) -> tuple[Tensor | None, ...]:
    losses = list(_losses(output))
    if not losses or not parameters:
        return (None,) * len(parameters)
    return torch.autograd.grad(losses, parameters, allow_unused=True)


def _losses(output: Any) -> Iterator[Tensor]:
    yield from (t.float().mean() for t in floats(output) if t.requires_grad)
