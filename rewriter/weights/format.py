"""A format: how a matrix is stored, and what can be done with it there.

A format is one class: its operator (in `kernels/`), the parts that the operator reads with the axes
of each, and what becomes of them when the matrix changes. Parts are stored below the weight's name:
`up.weight.codes`, `up.weight.scale`. Nothing else knows how they are laid out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from ..errors import ExportError, FoldError
from ..graph.stored_call import FORMATS
from .blocks import rounded, widest
from .packed import whole_groups

F = TypeVar("F", bound="Format")

_CLASSES: dict[str, type[Format]] = {}
"""Operator -> format; filled by subclassing."""


@dataclass(frozen=True)
class Format(ABC):
    """A matrix `[out, in]` as it is stored: pure tensors.

    Class attributes:
        operator: `operator(x, *parts, bias, *numbers)`; of a dense matrix the model's own.
        unpacks: the operator `(*parts, *numbers, size)` of the dense matrix.
        parts: names of the tensors, with their axes: `out`, `group` (of inputs), or another.
        numbers: names of the integers.
        scaled: the floating-point part whose rows are proportional to those of the matrix.
        own_columns: columns can be scaled one by one.
        exact: any matrix can be stored, but for rounding to a floating-point number.
    """

    operator: ClassVar[str] = ""
    unpacks: ClassVar[str] = ""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    numbers: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[str] = ""
    own_columns: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.operator:
            FORMATS[cls.operator] = cls.unpacks
            _CLASSES[cls.operator] = cls

    @classmethod
    @abstractmethod
    def packed(cls, matrix: Tensor, **options: Any) -> Self:
        """Stores a matrix `[out, in]`, floating; on the meta device without values.

        Args:
            options: the format's own.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, `[out, in]` in the dtype of what it is computed from."""

    @abstractmethod
    def replaced(self, exact: Tensor) -> Self:
        """Stores another matrix `[out, in]` in the same way.

        Where that loses something, the result is no further from `exact` than this is.
        """

    @property
    @abstractmethod
    def said(self) -> str:
        """In a few words, such as `4 bits`."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """How many inputs there are."""

    @property
    def rows(self) -> int:
        """How many outputs there are."""
        return self.tensors[self.scaled].shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts by name, in the operator's order."""
        return {name: getattr(self, name) for name in self.parts}

    @property
    def integers(self) -> dict[str, int]:
        """The numbers by name, in the operator's order."""
        return {name: getattr(self, name) for name in self.numbers}

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix is rounded to where it is scaled."""
        return self.tensors[self.scaled].dtype

    @property
    def device(self) -> torch.device:
        """Storage device."""
        return self.tensors[self.scaled].device

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What training leaves alone, and loading has to find again: the integers."""
        return {n: t for n, t in self.tensors.items() if not t.is_floating_point()}

    def rows_scaled(self, scale: Tensor) -> Self:
        """The matrix with its rows times `scale [out]`, rounded once."""
        old = self.tensors[self.scaled]
        wide = torch.promote_types(old.dtype, torch.float32)
        factor = scale.to(wide).view(-1, *(1 for _ in old.shape[1:]))
        return replace(self, **{self.scaled: (old.to(wide) * factor).to(old.dtype)})

    def columns_scaled(self, factor: Tensor) -> Self:
        """The matrix times `factor [out or 1, in]`, equal for all rows.

        Raises:
            FoldError: that needs other integers.
        """
        raise FoldError(f"columns in {self.said} share what they are stored with. Keep the branch.")

    def slice(self, axis: str, index: Tensor) -> Self:
        """Some rows or columns, as they are stored.

        Args:
            axis: `out` or `in`.
            index: int64.

        Raises:
            PassError: columns of a group would be parted.
        """
        if axis == "out":
            taken = {n: self.tensors[n][index] for n, a in self.parts.items() if a[0] == "out"}
            return replace(self, **taken)
        groups = whole_groups(index, self.integers["group"], self.columns)
        taken = {n: self.tensors[n][:, groups] for n, a in self.parts.items() if "group" in a}
        return replace(self, in_features=len(index), **taken)

    def pack(self, layout: str) -> Self | None:
        """The same matrix as another runtime takes it, None if it has no such thing.

        Args:
            layout: such as `matmulnbits`, that of an operator of ONNX Runtime.

        Raises:
            ExportError: the layout is unknown, or cannot hold these sizes.
        """
        if layout not in LAYOUTS:
            raise ExportError(f"there is no layout {layout!r}. Layouts: {', '.join(LAYOUTS)}.")
        return None


LAYOUTS = ("matmulnbits", "matmulbnb4")


def nearest(exact: Tensor, one: F, other: F) -> F:
    """For each row of `exact` that of the nearer of two formats; of the first where none is."""
    gaps = [(f.dense().to(exact) - exact).square().sum(1) for f in (one, other)]
    better = gaps[1] < gaps[0]
    changed: dict[str, Tensor] = {}
    for name, axes in one.parts.items():
        if axes[0] == "out":
            mine, its = one.tensors[name], other.tensors[name]
            changed[name] = torch.where(better.view(-1, *(1 for _ in mine.shape[1:])), its, mine)
    return replace(one, **changed)


def format_of(operator: str) -> type[Format]:
    """The format that an operator multiplies by."""
    return _CLASSES[operator]


@dataclass(frozen=True)
class Dense(Format):
    """One floating-point tensor `[out, in]`; how its axes are laid out says the weight's shape."""

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"matrix": ("out", "in")}
    scaled: ClassVar[str] = "matrix"
    own_columns: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    matrix: Tensor

    @classmethod
    def packed(cls, matrix: Tensor, **options: Any) -> Self:
        return cls(matrix, **options)

    @property
    def said(self) -> str:
        return str(self.matrix.dtype).removeprefix("torch.")

    @property
    def columns(self) -> int:
        return self.matrix.shape[1]

    def dense(self) -> Tensor:
        return self.matrix

    def replaced(self, exact: Tensor) -> Self:
        return replace(self, matrix=exact.to(self.matrix.dtype))

    def rows_scaled(self, scale: Tensor) -> Self:
        factor = scale.to(widest(self.matrix))[:, None]
        changed = rounded(self.matrix, lambda block, rows: block.mul_(factor[rows]))
        return replace(self, matrix=changed)

    def columns_scaled(self, factor: Tensor) -> Self:
        wide = factor.expand(self.matrix.shape)
        changed = rounded(self.matrix, lambda block, rows: block.mul_(wide[rows]))
        return replace(self, matrix=changed)

    def slice(self, axis: str, index: Tensor) -> Self:
        return replace(self, matrix=self.matrix.index_select(int(axis != "out"), index))
