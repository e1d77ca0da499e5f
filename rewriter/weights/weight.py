"""What a site multiplies by: a shape (linear, convolution, embedding, experts; see
`branches/shapes.py`) in a format.

Formats: dense (here), whole or a slice of a fused tensor, maybe tied; or integers (`quantised.py`).
Folding goes through these words, so that a new format is one more class and no new fold rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..branches.branch import Branch
from ..branches.shapes import Shape
from ..errors import FoldError, MetaTensorError, NonFiniteError
from ..graph.aten import set_attribute
from ..graph.sharded import is_sharded, placed_like, whole
from ..measure.compare import all_finite
from ..program.sites import WeightSite
from .certificate import Matrix


@dataclass(kw_only=True)
class Weight(ABC):
    """A weight and bias under edit; `store` writes them back as new Parameters."""

    module: GraphModule
    name: str
    bias_name: str | None
    bias: Tensor | None
    shape: Shape

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Outputs of one matrix: rows of `dense()`, or a part of them where it is a stack."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the product is computed in, and what branches beside it should have."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Storage device."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix as `[out, in]`, a stack of them as `[count * out, in]`."""

    def matrix(self) -> Matrix:
        """What a check of folding compares."""
        return Matrix(self.dense(), self.bias, self.dtype)

    @abstractmethod
    def stored(self) -> Mapping[str, Tensor]:
        """The floating-point tensors behind the matrix, by name: what folding may change."""

    def refuses(self, branch: Branch) -> str:
        """Why a branch cannot fold into this storage; empty if it can."""
        del branch
        return ""

    def with_delta(self, delta: Tensor) -> tuple[Self, float]:
        """Adds `delta [out, in]` in at least float32; see `replaced`."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.replaced(self.dense().to(wide) + delta.to(wide))

    @abstractmethod
    def replaced(self, exact: Tensor) -> tuple[Self, float]:
        """Takes `exact [out, in]` in its place, rounded once to the storage dtype.

        Returns:
            The new weight and the share of the change lost to rounding, ||lost|| / ||change||.
        """

    @abstractmethod
    def with_rows(self, scale: Tensor) -> Self:
        """Scales outputs: rows of the matrix and the bias by `scale [count * out]`."""

    @abstractmethod
    def with_columns(self, scale: Tensor) -> Self:
        """Scales inputs: columns of the matrix by a scale, see `Shape.columns`."""

    def scaled_bias(self, scale: Tensor) -> Tensor | None:
        """The bias times `scale [out]`, rounded once."""
        if self.bias is None:
            return None
        wide = torch.promote_types(self.bias.dtype, torch.float32)
        return (self.bias.to(wide) * scale.to(wide)).to(self.bias.dtype)

    def require_values(self) -> None:
        """Raises MetaTensorError if the weight has none."""
        if self.device.type == "meta":
            raise MetaTensorError(
                f"{self.name} is on the meta device. Load weights before folding "
                "(peftfx.load_weights), or fold into files (peftfx.fold_checkpoint)."
            )

    def store(self) -> None:
        """Puts new Parameters under the old names; the old tensors stay as they are.

        Raises:
            NonFiniteError: folding produced NaN or infinity.
        """
        tensors = dict(self.stored())
        if self.bias_name is not None and self.bias is not None:
            tensors[self.bias_name] = self.bias
        for name, tensor in tensors.items():
            old = self.module.get_parameter(name)
            if not (tensor.is_meta or is_sharded(old)) and tensor.data_ptr() == old.data_ptr():
                continue  # a bias that no rule touched
            if not all_finite(tensor):
                raise NonFiniteError(
                    f"folding into {name} gives NaN or infinity in {str(tensor.dtype)[6:]}, whose "
                    f"largest number is {torch.finfo(tensor.dtype).max:.3g}: what the branch adds "
                    "does not fit. Keep the branch, or capture the model in another dtype."
                )
            if old.shape != tensor.shape:
                raise FoldError(f"{name}: folded shape {tuple(tensor.shape)} is not {old.shape}.")
            placed = placed_like(tensor, old)
            set_attribute(self.module, name, nn.Parameter(placed, old.requires_grad))


@dataclass(kw_only=True)
class DenseWeight(Weight):
    """One tensor, laid out as its shape says."""

    tensor: Tensor

    @staticmethod
    def of(module: GraphModule, site: WeightSite, shape: Shape) -> DenseWeight:
        """The whole stored weight behind a site."""
        bias = whole(module.get_parameter(site.bias).detach()) if site.bias else None
        tensor = whole(module.get_parameter(site.weight).detach())
        return DenseWeight(
            module=module, name=site.weight, bias_name=site.bias, bias=bias, tensor=tensor,
            shape=shape,
        )  # fmt: skip

    @property
    def out_features(self) -> int:
        return self.dense().shape[0] // self.shape.count

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dense(self) -> Tensor:
        return self.shape.matrix(self.tensor)

    def stored(self) -> Mapping[str, Tensor]:
        return {self.name: self.tensor}

    def replaced(self, exact: Tensor) -> tuple[Self, float]:
        rounded = exact.to(self.dtype)
        lost = 0.0
        if self.dtype != exact.dtype and (norm := float((exact - self.dense()).norm())):
            lost = float((rounded.to(exact.dtype) - exact).norm()) / norm
        return self._with(rounded, self.bias), lost

    def with_rows(self, scale: Tensor) -> Self:
        wide = torch.promote_types(self.dtype, torch.float32)
        dense = (self.dense().to(wide) * scale.to(wide)[:, None]).to(self.dtype)
        return self._with(dense, self.scaled_bias(scale))

    def with_columns(self, scale: Tensor) -> Self:
        wide = torch.promote_types(self.dtype, torch.float32)
        factor = self.shape.columns(scale.to(wide), self.dense())
        dense = (self.dense().to(wide) * factor).to(self.dtype)
        return self._with(dense, self.bias)

    def _with(self, dense: Tensor, bias: Tensor | None) -> Self:
        return replace(self, tensor=self.shape.stored(dense), bias=bias)
