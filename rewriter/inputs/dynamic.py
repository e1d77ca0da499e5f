"""Which axes of the example inputs are to be dynamic, and what their sizes are called."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from ..errors import CaptureError
from .relation import FUNCTIONS

Dynamic = Literal["auto"] | Mapping[str, Mapping[int, str]] | None


def dynamic_axes(tensors: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, dict[int, str]]:
    """The dynamic axes of each input, counted from the front, with the user's name for each size
    ('' where it is ours to name).

    Raises:
        CaptureError: `dynamic` names an input or an axis that is not there, an axis twice, one
            size for axes whose example sizes differ, or no names.
    """
    if dynamic is None:
        return {name: {} for name in tensors}
    if isinstance(dynamic, Mapping):
        unknown = sorted(set(dynamic) - set(tensors))
        if unknown:
            raise CaptureError(f"dynamic names {unknown}, but the inputs are {sorted(tensors)}.")
        axes = {name: _named(name, tensors[name], dynamic.get(name, {})) for name in tensors}
        _check_equal(tensors, axes)
        return axes
    if dynamic != "auto":
        raise CaptureError(f"dynamic must be 'auto', None or a mapping, not {dynamic!r}.")
    return {name: dict.fromkeys(_automatic(tensor), "") for name, tensor in tensors.items()}


def _automatic(tensor: Tensor) -> list[int]:
    discrete = not tensor.is_floating_point()
    second = (discrete and tensor.dim() >= 2) or tensor.dim() == 3
    return [0, 1] if second else [0] if tensor.dim() else []


def _named(name: str, tensor: Tensor, wanted: Mapping[int, str]) -> dict[int, str]:
    if not isinstance(wanted, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CaptureError(f"dynamic[{name!r}] must be {{axis: name}}, not {wanted!r}.")
    axes: dict[int, str] = {}
    rank = tensor.dim()
    for axis, label in wanted.items():
        if type(axis) is not int or not -rank <= axis < rank:
            raise CaptureError(
                f"dynamic names axis {axis!r} of {name!r}, whose example has the shape "
                f"{tuple(tensor.shape)}. Give an axis from {-rank} to {rank - 1}."
            )
        if axis % rank in axes:
            raise CaptureError(f"dynamic names axis {axis % rank} of {name!r} twice.")
        if not _is_name(label):
            raise CaptureError(
                f"dynamic calls axis {axis} of {name!r} {label!r}. The name of a size is a word of "
                "letters, digits and underscores, such as 'batch'."
            )
        axes[axis % rank] = label
    return axes


def _is_name(label: object) -> bool:
    return (
        isinstance(label, str)
        and label.isidentifier()
        and not keyword.iskeyword(label)
        and label not in FUNCTIONS
    )


def _check_equal(tensors: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> None:
    firsts: dict[str, tuple[str, int, int]] = {}
    for name, labels in axes.items():
        for axis, label in labels.items():
            size = tensors[name].shape[axis]
            first, place, other = firsts.setdefault(label, (name, axis, size))
            if size != other:
                raise CaptureError(
                    f"dynamic calls axis {place} of {first!r} and axis {axis} of {name!r} "
                    f"{label!r}, but in the example one is {other} and the other {size}. Give them "
                    "two names, or an example in which they are equal."
                )
