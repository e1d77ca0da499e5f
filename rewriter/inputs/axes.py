"""What the dynamic axes of inputs are: samples of a batch, or tokens of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["batch", "token"]
"""What the places along an axis are: samples, or what belongs to one sample (tokens, frames,
pixels)."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Axis:
    """A dynamic axis of an input.

    Attributes:
        name: of its size, such as `sequence`.
        kind: what lies along it.
    """

    name: str
    kind: Kind


def axis_of(name: str, kinds: Mapping[str, Kind]) -> Axis:
    """The axis whose size is called so; where nothing else is known, the name says the kind."""
    return Axis(name, kinds.get(name, "batch" if name.startswith("batch") else "token"))
