"""Quantised weights: integers, scales and zero points in the place of one tensor.

The parameter `name` leaves the program; `name.codes`, `name.scale` and `name.zero` take its place
and the linear's calls become `operator(x, codes, scale, zero, bias, bits, group)`. Sites, branches
and patterns see a linear as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..branches.branch import Branch, OutputScale
from ..branches.shapes import LinearShape
from ..errors import ExportError, FoldError
from ..graph.aten import attribute, is_quantised, value
from ..graph.flow import site_nodes
from ..graph.quantised_call import QuantisedCall
from ..graph.sharded import whole
from ..program.sites import LinearSite, WeightSite
from ..program.state import State
from .certificate import Matrix
from .integers import Quantised
from .shape import shape_of
from .weight import DenseWeight, Weight


@dataclass(kw_only=True)
class QuantisedWeight(Weight):
    """Integers with a scale and a zero point a group; `compute` is the product's dtype.

    Output scales fold exactly into the scales. What would need other integers does not fold.
    """

    tensor: Quantised
    compute: torch.dtype

    @staticmethod
    def of(module: GraphModule, site: LinearSite, call: Node) -> QuantisedWeight:
        """What the quantised linear `call` of a site multiplies by."""
        bias = whole(module.get_parameter(site.bias).detach()) if site.bias else None
        return QuantisedWeight(
            module=module, name=site.weight, bias_name=site.bias, bias=bias,
            tensor=_stored(module, site, call), compute=value(call).dtype,
            shape=LinearShape(site.in_out),
        )  # fmt: skip

    @property
    def out_features(self) -> int:
        return self.tensor.codes.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    @property
    def device(self) -> torch.device:
        return self.tensor.codes.device

    def dense(self) -> Tensor:
        return self.tensor.dense().to(self.compute)

    def matrix(self) -> Matrix:
        return Matrix(self.tensor.dense(), self.bias, self.tensor.scale.dtype, roundings=2)

    def stored(self) -> Mapping[str, Tensor]:
        return {f"{self.name}.scale": self.tensor.scale}

    def refuses(self, branch: Branch) -> str:
        if isinstance(branch, OutputScale):
            return ""
        return (
            f"the weight is stored in {self.tensor.bits} bits, and rounding to them again would "
            "lose most of what the branch learnt. Keep the branch beside the integers, or fold it "
            "before the weight is quantised"
        )

    def replaced(self, exact: Tensor) -> tuple[Self, float]:
        raise FoldError(f"{self.name}: another matrix needs other integers. Keep the branch.")

    def with_rows(self, scale: Tensor) -> Self:
        old = self.tensor.scale
        tensor = replace(self.tensor, scale=old * scale.to(old.dtype)[:, None])
        return replace(self, tensor=tensor, bias=self.scaled_bias(scale))

    def with_columns(self, scale: Tensor) -> Self:
        raise FoldError(f"{self.name}: the columns of a group share a scale. Keep the branch.")

    def pack(self, layout: str) -> Quantised:
        """The tensors as another runtime takes them.

        Args:
            layout: `matmulnbits`, ONNX Runtime's: groups are powers of two from 16 on. Other
                groups are cut into such ones, which repeat the scale; the matrix is the same.

        Raises:
            ExportError: the layout is unknown, or cannot hold groups of this size.
        """
        if layout != "matmulnbits":
            raise ExportError(f"{self.name}: there is no layout {layout!r}. Layouts: matmulnbits.")
        block = self.tensor.group & -self.tensor.group
        if block < 16 and self.tensor.codes.shape[1] == 1:  # padding completes a group of a row
            block = max(16, 1 << (self.tensor.group - 1).bit_length())
        if block < 16:
            raise ExportError(
                f"{self.name}: MatMulNBits has groups of 16, 32, 64, ... columns, and "
                f"{self.tensor.group} is no multiple of 16. Quantise with group=16, 32, 64 or 128."
            )
        return self.tensor if block == self.tensor.group else self.tensor.regrouped(block)


def _stored(module: GraphModule, site: LinearSite, call: Node) -> Quantised:
    """The stored tensors that a quantised linear's call reads."""
    held = QuantisedCall.of(call)
    if held is None:
        raise FoldError(f"{site.weight}: {call.name} is no linear over integers.")
    codes, scale, zero = (whole(attribute(module, str(n.target))).detach() for n in held.stored)
    return Quantised(codes, scale, zero, held.bits, held.group, site.in_features)


def quantised_calls(program: State) -> dict[str, Node]:
    """One call of each quantised weight, by the weight's name."""
    nodes = site_nodes(program.module)
    found: dict[str, Node] = {}
    for site in program.sites:
        call = nodes.get(site.nodes[0])
        if isinstance(site, LinearSite) and call is not None and is_quantised(call):
            found[site.weight] = call
    return found


def dense_weights(program: State) -> dict[str, Tensor]:
    """The quantised weights as dense ones, stored as the model does, by name."""
    sites = {s.weight: s for s in program.sites if isinstance(s, LinearSite)}
    found: dict[str, Tensor] = {}
    for name, call in quantised_calls(program).items():
        weight = QuantisedWeight.of(program.module, sites[name], call)
        found[name] = weight.shape.stored(weight.dense())
    return found


def weight_of(module: GraphModule, site: WeightSite, call: Node | None) -> Weight:
    """What a site multiplies by, however it is stored; `call` is its first call.

    Raises:
        PassError: no branch can stand beside the call.
    """
    if isinstance(site, LinearSite) and call is not None and is_quantised(call):
        return QuantisedWeight.of(module, site, call)
    return DenseWeight.of(module, site, shape_of(site, call))
