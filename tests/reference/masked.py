"""An independent reference of structured pruning: the whole model with masked channels.

Adapters and masks are forward hooks on the plain model's linears. Imports nothing of peftfx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Linear:
    """What stands around one linear: `y = out * (W x' + b + sum s B A x')`, `x' = in * mask * x`.

    A delta is (a, b, s, rows): rows None for all outputs, else those of a fused weight.
    `serial` are the tensors of a bottleneck with skip on y.
    """

    mask: Tensor | None = None
    input_scale: Tensor | None = None
    deltas: list[tuple[Tensor, Tensor, float, Tensor | None]] = field(default_factory=list)
    output_scale: Tensor | None = None
    serial: Mapping[str, Tensor] | None = None

    def __call__(self, module: nn.Module, inputs: Any, _: Any) -> Tensor:
        x = inputs[0]
        for factor in (self.mask, self.input_scale):
            x = x if factor is None else x * factor
        y = module.forward(x)
        for a, b, scale, rows in self.deltas:
            d = scale * (x @ a.T) @ b.T
            y = y + d if rows is None else y.index_add(-1, rows, d)
        y = y if self.output_scale is None else y * self.output_scale
        if self.serial is None:
            return y
        t = self.serial
        return y + F.gelu(y @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]


def masked(model: nn.Module, linears: Mapping[str, Linear], inputs: Mapping[str, Tensor]) -> Any:
    """The model's output with the given linears, by module name."""
    handles = [model.get_submodule(n).register_forward_hook(f) for n, f in linears.items()]
    try:
        return model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
