"""State dicts without the frozen base: what training changes, and every adapter's tensors.

Nobody's saving code knows of it: while `leave_out` is in force, `module.state_dict()` is short,
and while `fill_in` is, loading such a dict takes the rest from the module itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..rewriter.graph.modes import MODES
from ..rewriter.graph.module import state_buffers
from ..rewriter.program.state import BRANCHES, State


def frozen_base(program: State) -> frozenset[str]:
    """Names of the base tensors that training leaves as they are."""
    module = program.module
    names = {n for n, p in module.named_parameters() if not p.requires_grad}
    names |= {n for n, _ in module.named_buffers()} - state_buffers(module)
    inserted = (f"{BRANCHES}.", f"{MODES}.")
    return frozenset(n for n in names - _transient(module) if not n.startswith(inserted))


def _transient(module: nn.Module) -> set[str]:
    """Names of buffers that no state dict has."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, inner in module.named_modules()
        for name in inner._non_persistent_buffers_set
    }


def leave_out(module: nn.Module, names: frozenset[str]) -> RemovableHandle:
    """From now on the module's state dicts lack `names`; until the handle is removed."""

    def shorten(_: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in names:
            state.pop(f"{prefix}{name}", None)

    return module.register_state_dict_post_hook(shorten)


def fill_in(module: nn.Module, names: frozenset[str]) -> RemovableHandle:
    """From now on state dicts to load may lack `names`; until the handle is removed."""

    def complete(_: Any, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in names:
                state.setdefault(f"{prefix}{name}", tensor.detach())

    return module.register_load_state_dict_pre_hook(complete)
