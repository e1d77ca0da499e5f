"""What a linear site multiplies by, independent of how it is stored.

Today: dense, stored `[out, in]` or `[in, out]`, whole or a slice of a fused tensor, maybe tied.
Folding goes through this class, so that a new storage is one more class and no new fold rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..aten import set_attribute
from ..errors import FoldError, MetaTensorError, NonFiniteError

if TYPE_CHECKING:
    from ..sites.sites import LinearSite


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass without a temporary where that is so."""
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())


@dataclass
class Weight:
    """A weight and bias under edit; `store` writes them back as new Parameters."""

    module: GraphModule
    name: str
    bias_name: str | None
    tensor: Tensor
    bias: Tensor | None
    in_out: bool

    @staticmethod
    def of(module: GraphModule, site: LinearSite) -> Weight:
        """The whole stored weight behind a site."""
        bias = module.get_parameter(site.bias).detach() if site.bias else None
        tensor = module.get_parameter(site.weight).detach()
        return Weight(module, site.weight, site.bias, tensor, bias, site.in_out)

    @property
    def out_features(self) -> int:
        """Rows of `dense()`."""
        return self.tensor.shape[1 if self.in_out else 0]

    @property
    def in_features(self) -> int:
        """Columns of `dense()`."""
        return self.tensor.shape[0 if self.in_out else 1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Storage device."""
        return self.tensor.device

    def dense(self) -> Tensor:
        """The matrix as `[out, in]`."""
        return self.tensor.T if self.in_out else self.tensor

    def with_delta(self, delta: Tensor) -> tuple[Weight, float]:
        """Adds `delta [out, in]` in at least float32; see `replaced`."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.replaced(self.dense().to(wide) + delta.to(wide))

    def replaced(self, exact: Tensor) -> tuple[Weight, float]:
        """Takes `exact [out, in]` in its place, rounded once to the storage dtype.

        Returns:
            The new weight and the share of the change lost to rounding, ||lost|| / ||change||.
        """
        rounded = exact.to(self.dtype)
        lost = 0.0
        if self.dtype != exact.dtype and (norm := float((exact - self.dense()).norm())):
            lost = float((rounded.to(exact.dtype) - exact).norm()) / norm
        return self._with(rounded, self.bias), lost

    def with_rows(self, scale: Tensor) -> Weight:
        """Scales outputs: rows of the matrix and the bias by `scale [out]`."""
        wide = torch.promote_types(self.dtype, torch.float32)
        dense = (self.dense().to(wide) * scale.to(wide)[:, None]).to(self.dtype)
        bias = None if self.bias is None else (self.bias.to(wide) * scale.to(wide)).to(self.dtype)
        return self._with(dense, bias)

    def with_columns(self, scale: Tensor) -> Weight:
        """Scales inputs: columns of the matrix by `scale [in]`."""
        wide = torch.promote_types(self.dtype, torch.float32)
        dense = (self.dense().to(wide) * scale.to(wide)[None, :]).to(self.dtype)
        return self._with(dense, self.bias)

    def _with(self, dense: Tensor, bias: Tensor | None) -> Weight:
        tensor = dense.T.contiguous() if self.in_out else dense.contiguous()
        return Weight(self.module, self.name, self.bias_name, tensor, bias, self.in_out)

    def require_values(self) -> None:
        """Raises MetaTensorError if the weight has none."""
        if self.tensor.is_meta:
            raise MetaTensorError(
                f"{self.name} is on the meta device. Load weights before folding "
                "(peftfx.load_weights), or fold into files (peftfx.fold_checkpoint)."
            )

    def store(self) -> None:
        """Puts new Parameters under the old names; the old tensors stay as they are.

        Raises:
            NonFiniteError: folding produced NaN or infinity.
        """
        for name, tensor in ((self.name, self.tensor), (self.bias_name, self.bias)):
            if name is None or tensor is None:
                continue
            old = self.module.get_parameter(name)
            if not tensor.is_meta and tensor.data_ptr() == old.data_ptr():
                continue  # a bias that no rule touched
            if not all_finite(tensor):
                raise NonFiniteError(
                    f"folding into {name} gives NaN or infinity in {str(tensor.dtype)[6:]}. Look "
                    "for non-finite branch parameters, or keep the branch."
                )
            if old.shape != tensor.shape:
                raise FoldError(f"{name}: folded shape {tuple(tensor.shape)} is not {old.shape}.")
            set_attribute(self.module, name, nn.Parameter(tensor, requires_grad=False))
