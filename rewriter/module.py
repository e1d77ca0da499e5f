"""The module of a program: a graph module that knows what may be changed after capture.

Devices that the graph names (`arange(device=cpu)`) move with the tensors. The dtype does not: casts
to a literal dtype and branches on the dtype were decided when the model was traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from .errors import CaptureError


class CapturedModule(GraphModule):
    """A graph module that moves between devices as a whole and refuses another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.cuda()`, `.half()` and the like call, for every tensor.

        Raises:
            CaptureError: it would change a floating-point dtype; nothing is changed.
        """
        before = self.device
        held = [*self.parameters(), *self.buffers()]
        for dtype in {t.dtype for t in held if t.is_floating_point()}:
            changed = fn(torch.empty(0, dtype=dtype, device=before)).dtype
            if changed != dtype:
                raise CaptureError(
                    f"a captured graph keeps its dtype: casts to {dtype} are part of it, so "
                    f"{changed} would give wrong results or fail. Capture again in that dtype: "
                    f"peftfx.capture(model, ..., dtype={changed}). For mixed precision, run it "
                    "under torch.autocast."
                )
        super()._apply(fn, recurse)
        if self.device != before:
            self._rename_device(before, self.device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the stored tensors."""
        for held in (self.parameters(), self.buffers()):
            for tensor in held:
                return tensor.device
        return torch.device("cpu")

    def _rename_device(self, old: torch.device, new: torch.device) -> None:
        def renamed(arg: Any) -> Any:
            return new if isinstance(arg, torch.device) and arg.type == old.type else arg

        def moved(val: Any) -> Any:
            mode = getattr(val, "fake_mode", None)
            if mode is None or val.device.type != old.type:
                return val
            with mode, torch.no_grad():
                return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=new)

        for module in self.modules():
            if not isinstance(module, GraphModule):
                continue
            for node in module.graph.nodes:
                node.args = map_aggregate(node.args, renamed)
                node.kwargs = map_aggregate(node.kwargs, renamed)
                if "val" in node.meta:
                    node.meta["val"] = pytree.tree_map_only(Tensor, moved, node.meta["val"])
            module.recompile()
