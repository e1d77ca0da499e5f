"""Which branch a fault is of: one that fails while a program is measured, or writes its input."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import RewriteError, VerifyError
from .compare import floats, tensors
from .witness import Witness


@contextlib.contextmanager
def watched(witness: Witness, what: str, paths: Collection[str] | None = None) -> Iterator[None]:
    """Names the branch that fails, or writes its input in place, while the witness runs.

    What the model itself raises is left as it is.

    Args:
        witness: of a program with branches.
        what: the pass.
        paths: of the branches to watch; by default of all.

    Raises:
        VerifyError: a branch does.
    """
    inside: list[tuple[str, list[tuple[Tensor, int]]]] = []

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [] if getattr(module, "updates_state", False) else tensors((args, kwargs))
        inside.append((path, [(t, t._version) for t in given if not t.is_inference()]))

    def leave(*_: Any) -> None:
        path, given = inside.pop()
        if any(t._version != version for t, version in given):
            raise VerifyError(
                f"{what}: the branch {place(witness, path)} writes its input in place, which "
                "others read as well. Compute a new tensor instead (x * y, not x.mul_(y))."
            )

    with contextlib.ExitStack() as hooks:
        for path, module in branches(witness, paths).items():

            def entered(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                enter(path, module, args, kwargs)

            hooks.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        try:
            yield
        except RewriteError:
            raise
        except Exception as error:
            if not inside:
                raise
            raise VerifyError(_failing(what, "", place(witness, inside[-1][0]), error)) from error


def require_backward(witness: Witness, inputs: Mapping[str, Tensor], what: str) -> None:
    """Raises VerifyError for a branch whose backward fails by itself, in the mode of the witness.

    Args:
        witness: of a program with branches, with gradients on.
        inputs: that it is called with.
        what: the pass.
    """
    calls: dict[str, tuple[nn.Module, Any]] = {}
    with contextlib.ExitStack() as hooks:
        for path, module in branches(witness).items():

            def entered(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                calls[path] = module, pytree.tree_map(_leaf, (args, kwargs))

            hooks.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
        witness.gm(**witness.completed(inputs))
    for path, (module, given) in calls.items():
        args, kwargs = given
        leaves = [t for t in (*tensors(given), *module.parameters()) if t.requires_grad]
        try:
            losses = [t.float().mean() for t in floats(module(*args, **kwargs)) if t.requires_grad]
            if losses and leaves:
                torch.autograd.grad(losses, leaves, allow_unused=True)
        except Exception as error:
            where = place(witness, path)
            raise VerifyError(_failing(what, "the backward of ", where, error)) from error


def _leaf(value: Any) -> Any:
    """A tensor by itself, to ask a gradient for."""
    if not isinstance(value, Tensor):
        return value
    alone = value.detach().clone()
    return alone.requires_grad_() if alone.is_floating_point() else alone


def branches(witness: Witness, paths: Collection[str] | None = None) -> dict[str, nn.Module]:
    """The inserted modules that the graph calls, by path; those at some paths alone."""
    gm, program = witness.gm, witness.program
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    called = called if paths is None else called.intersection(paths)
    return {p: gm.get_submodule(p) for p in sorted(called) if program.inserts(f"{p}.")}


def place(witness: Witness, path: str) -> str:
    """A branch's path with its site."""
    site = witness.program.site_of(path)
    return f"{path} at {site}" if site else path


def _failing(what: str, part: str, where: str, error: Exception) -> str:
    kind, said = type(error).__name__, str(error).strip().splitlines()
    return f"{what}: {part}the branch {where} fails: {kind}{f': {said[0][:300]}' if said else ''}"
