"""What a site multiplies by: a shape (linear, convolution, embedding, experts; see
`branches/shapes.py`) in a format (dense, integers, codes, signs, pairs; see `format.py`).

Folding goes through these words, so that a new format is one more class and no new fold rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..branches.branch import Branch, Expression, InputScale, OutputScale
from ..branches.shapes import Shape
from ..errors import FoldError, MetaTensorError, NonFiniteError
from ..graph.aten import attribute, set_attribute, value
from ..graph.flow import site_nodes
from ..graph.sharded import is_sharded, placed_like, whole
from ..graph.weighted_call import stored_of
from ..measure.compare import all_finite
from ..program.sites import EmbeddingSite, WeightSite
from ..program.state import State
from . import codebook, integers, onebit, sparse24  # noqa: F401 # pyright: ignore[reportUnusedImport] - the formats that there are
from .blocks import rounded
from .format import Dense, Format, format_of
from .shape import shape_of
from .verdict import Matrix


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight and bias under edit; `store` writes them back as new tensors.

    Attributes:
        name: of the weight; the parts of a stored format have names below it.
        shape, format: how its calls multiply by it, and how it is stored.
        dtype: what the product is computed in, and what branches beside it should have.
    """

    module: nn.Module
    name: str
    bias_name: str | None
    bias: Tensor | None
    shape: Shape
    format: Format
    dtype: torch.dtype

    @property
    def is_dense(self) -> bool:
        """Whether it is one floating-point tensor, as the model has it."""
        return isinstance(self.format, Dense)

    @property
    def turned(self) -> bool:
        """Whether the format stores `[in, out]`."""
        return self.shape.turned and not self.is_dense

    @property
    def out_features(self) -> int:
        """Outputs of one matrix: rows of `dense()`, or a part of them where it is a stack."""
        return (self.format.columns if self.turned else self.format.rows) // self.shape.count

    @property
    def device(self) -> torch.device:
        """Storage device."""
        return self.format.device

    def dense(self) -> Tensor:
        """The matrix as `[out, in]`, a stack of them as `[count * out, in]`."""
        return self._matrix().to(self.dtype)

    def _matrix(self) -> Tensor:
        dense = self.format.dense()
        return dense.mT if self.turned else dense

    def tensor(self) -> Tensor:
        """The same laid out as the model does."""
        return self.shape.stored(self.dense())

    def in_format(self, kind: type[Format], **options: Any) -> Weight:
        """The same matrix in another format.

        Args:
            options: the format's own, see its `packed`.
        """
        dense = self.dense()
        packed = kind.packed(dense.mT if self.shape.turned else dense, **options)
        return replace(self, format=packed)

    def matrix(self) -> Matrix:
        """What a check of folding compares."""
        dense = self._matrix()
        return Matrix(dense, self.bias, self.format.dtype, roundings=0 if self.is_dense else 2)

    @property
    def names(self) -> list[str]:
        """The floating-point tensors behind the matrix: what folding may change."""
        if self.is_dense:
            return [self.name]
        parts = self.format.tensors.items()
        return [f"{self.name}.{n}" for n, t in parts if t.is_floating_point()]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        if isinstance(self.format, Dense):
            return {self.name: self.shape.stored(self.format.matrix)}
        return {f"{self.name}.{n}": t for n, t in self.format.tensors.items()}

    def refuses(self, branch: Branch) -> str:
        """Why a branch cannot fold into this storage without loss; empty if it can."""
        by_row, by_column = (InputScale, OutputScale) if self.turned else (OutputScale, InputScale)
        scales = isinstance(branch, by_row)
        scales = scales or (isinstance(branch, by_column) and self.format.own_columns)
        if self.format.exact or scales:
            return ""
        if isinstance(branch, Expression):
            return (
                f"the weight is stored in {self.format.said}, which hold no other value of single "
                "entries. Keep the expression, or say fold{lossy=true}"
            )
        return (
            f"the weight is stored in {self.format.said}, and rounding to them again would "
            "lose most of what the branch learnt. Keep the branch beside it, fold it before the "
            "weight is stored so, or say fold{lossy=true}"
        )

    def with_rows_changed(self, change: Callable[[Tensor, slice], object]) -> Weight:
        """The matrix `[out, in]` with its rows changed in float64, rounded once; see `rounded`."""
        if not isinstance(self.format, Dense):
            said = self.format.said
            raise FoldError(f"{self.name}: another matrix needs other {said}. Keep the branch.")
        return replace(self, format=Dense(rounded(self.format.matrix, change)))

    def packed_again(self, exact: Tensor) -> Weight:
        """Stores another matrix `[out, in]` in the same way, see `Format.replaced`."""
        return replace(self, format=self.format.replaced(exact.mT if self.turned else exact))

    def with_rows(self, scale: Tensor) -> Weight:
        """Scales outputs: rows of the matrix and the bias by `scale [count * out]`."""
        form = self.format
        form = form.columns_scaled(scale[None]) if self.turned else form.rows_scaled(scale)
        return replace(self, format=form, bias=self.scaled_bias(scale))

    def with_columns(self, scale: Tensor) -> Weight:
        """Scales inputs: columns of the matrix by a scale, see `Shape.columns`."""
        if self.turned:
            return replace(self, format=self.format.rows_scaled(scale))
        factor = self.shape.columns(scale, self.format.dense())
        return replace(self, format=self.format.columns_scaled(factor))

    def unpacked(self) -> Weight:
        """The same as one tensor, in which every branch folds; in float32 at least."""
        wide = torch.promote_types(self.format.dtype, torch.float32)
        return replace(self, format=Dense(self._matrix().to(wide)), dtype=wide)

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
        tensors = self.tensors()
        if self.bias_name is not None and self.bias is not None:
            tensors[self.bias_name] = self.bias
        for name, tensor in tensors.items():
            old = attribute(self.module, name)
            if not (tensor.is_meta or is_sharded(old)) and tensor.data_ptr() == old.data_ptr():
                continue  # what no rule touched
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


def put_format(gm: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Stores tensors under a weight's name or below it, in the place of what is there.

    Integers become buffers, and floating-point numbers Parameters, which train where those of the
    same names did.
    """
    path, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(path)
    trained = {n for n, p in gm.named_parameters() if n in tensors and p.requires_grad}
    owner._parameters.pop(leaf, None)
    owner._modules.pop(leaf, None)
    for part, tensor in tensors.items():
        floating = tensor.is_floating_point()
        kept = nn.Parameter(tensor, requires_grad=part in trained) if floating else tensor
        set_attribute(gm, part, kept, transient=False)


def weight_of(module: GraphModule, site: WeightSite, call: Node | None) -> Weight:
    """What a site multiplies by, however it is stored; `call` is its first call.

    Raises:
        PassError: no branch can stand beside the call.
    """
    bias = whole(attribute(module, site.bias)).detach() if site.bias else None
    shape, stored = shape_of(site, call), stored_of(call)
    if stored is not None:
        parts = {
            n: whole(attribute(module, str(p.target))).detach() for n, p in stored.parts.items()
        }
        form = format_of(stored.operator)(**parts, **stored.numbers, in_features=columns_of(site))  # pyright: ignore[reportCallIssue]
        known = value(call)  # none while sizes change
        dtype = form.dtype if known is None else known.dtype
    else:
        tensor = whole(module.get_parameter(site.weight).detach())
        form, dtype = Dense(shape.matrix(tensor)), tensor.dtype
    return Weight(
        module=module, name=site.weight, bias_name=site.bias, bias=bias, shape=shape, format=form,
        dtype=dtype,
    )  # fmt: skip


def columns_of(site: WeightSite) -> int:
    """How many columns a stored format of the site's matrices has."""
    _, out, size = site.matrices
    return out if isinstance(site, EmbeddingSite) else size


def weights_at(program: State, sites: Iterable[WeightSite]) -> dict[str, Weight]:
    """What sites multiply by, by the weight's name."""
    nodes = site_nodes(program.module)
    return {s.weight: weight_of(program.module, s, nodes.get(s.nodes[0])) for s in sites}


def stored_calls(program: State) -> dict[str, Node]:
    """One call of each weight that is stored in a format of ours, by the weight's name."""
    nodes = site_nodes(program.module)
    calls: dict[str, Node] = {}
    for site in program.sites:
        call = nodes.get(site.nodes[0]) if isinstance(site, WeightSite) else None
        if isinstance(site, WeightSite) and call is not None and stored_of(call) is not None:
            calls[site.weight] = call
    return calls


def stored_site(program: State, name: str) -> WeightSite | None:
    """A site of a weight that is stored in a format of ours; None where it is a dense tensor."""
    if name not in stored_calls(program):
        return None
    sites = (s for s in program.sites if isinstance(s, WeightSite))
    return next((s for s in sites if s.weight == name), None)


def stored_weights(program: State) -> dict[str, Weight]:
    """The weights that are stored in a format of ours, by name."""
    packed = stored_calls(program)
    sites = (s for s in program.sites if isinstance(s, WeightSite) and s.weight in packed)
    return weights_at(program, sites)


def dense_weights(program: State) -> dict[str, Tensor]:
    """The weights stored in a format of ours as dense ones, laid out as the model does, by name."""
    return {n: w.tensor() for n, w in stored_weights(program).items()}
