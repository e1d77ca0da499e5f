"""An adapter in parts: what it changes at which stored tensor, and nothing of how programs hold it.

All libraries' files are read into parts and written from them (`exporters/hf_peft.py` and its
neighbours), and the pass `imported` puts them into a program. Tensors are those of whole weights:
the features of fused ones lie in one part.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import CorruptFileError
from ..program.history import Plan

PARTS: dict[str, type[Part]] = {}
"""Kind -> class; filled by subclassing."""

_ORIGINAL = "original."


@dataclass(frozen=True)
class Part:
    """A change at one stored tensor.

    Attributes:
        target: the original name of a parameter; '' where the kind says which.
    """

    kind: ClassVar[str] = ""

    target: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__name__.lower()
        PARTS[cls.kind] = cls


@dataclass(frozen=True)
class LowRank(Part):
    """`W + scale b a`, or with a magnitude `diag(m / ||W + scale b a||_row) (W + scale b a)`.

    Attributes:
        a: `[rank, in]`, or of a stack of matrices (groups, experts) `[count, rank, in]`.
        b: `[out, rank]`, or `[count, out, rank]`.
        magnitude: `[count * out]`, or None.
        lookup: of the rows that ids look up, not of the product with the same table.
        dropout: probability on what `a` reads, in training.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    lookup: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Change(Part):
    """`W + delta`, with delta `[count * out, in]`: a form that no method here has."""

    delta: Tensor
    method: str = ""


@dataclass(frozen=True)
class Scaling(Part):
    """The inputs or the outputs (bias included) of a weight's calls times a vector.

    Attributes:
        vector: `[in]` or `[out]`.
        side: `in` or `out`.
    """

    vector: Tensor
    side: str


@dataclass(frozen=True)
class Trained(Part):
    """A stored tensor's own values, of its shape."""

    values: Tensor


@dataclass(frozen=True)
class Rows(Part):
    """Rows of a table `[size, width]` that take the place of its own.

    Attributes:
        ids: int64 `[count]`.
        values: `[count, width]`.
    """

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Prompt(Part):
    """Vectors `[length, width]` in front of the embedded tokens."""

    values: Tensor


@dataclass(frozen=True)
class Prefix(Part):
    """Rows in front of the keys and values of an attention, `[length, kv_heads, width]`.

    Attributes:
        layer: ordinal of the attention, in graph order.
        shifted: the tokens' positions count from behind the rows.
    """

    key: Tensor
    value: Tensor
    layer: int
    shifted: bool = True


@dataclass(frozen=True)
class Parts:
    """An adapter as a file had it.

    Attributes:
        parts: in the order of the file.
        source: what wrote it, such as `peft 0.21.2 LORA`.
        notes: what whoever reads the record has to know.
        config: the file's own description, which its writer needs again.
        original: the file's tensors, where the parts do not hold all that they say.
    """

    parts: tuple[Part, ...]
    source: str = ""
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    original: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def as_plan(parts: Parts) -> Plan:
    """The parts as strict JSON and tensors."""
    listed: list[dict[str, Any]] = []
    tensors = {f"{_ORIGINAL}{n}": t for n, t in parts.original.items()}
    for index, part in enumerate(parts.parts):
        values = {f.name: getattr(part, f.name) for f in fields(part)}
        own = {n: v for n, v in values.items() if isinstance(v, Tensor)}
        tensors |= {f"{index}.{n}": t for n, t in own.items()}
        listed.append({"kind": part.kind} | {n: v for n, v in values.items() if n not in own})
    about = {"source": parts.source, "notes": list(parts.notes), "config": dict(parts.config)}
    return Plan({"parts": listed, **about}, tensors)


def of_plan(plan: Plan) -> Parts:
    """Undoes `as_plan`.

    Raises:
        CorruptFileError: it holds something else.
    """
    parts: list[Part] = []
    for index, given in enumerate(plan.decisions.get("parts", ())):
        where = f"part {index} of the imported adapter"
        if not isinstance(given, Mapping) or given.get("kind") not in PARTS:
            raise CorruptFileError(f"{where} is of no kind that is known. The file was altered.")
        cls = PARTS[str(given["kind"])]  # pyright: ignore[reportUnknownArgumentType]
        values: dict[str, Any] = {k: v for k, v in given.items() if k != "kind"}  # pyright: ignore
        values |= _below(plan, f"{index}.")
        parts.append(_part(cls, values, where))
    about = plan.decisions
    notes = tuple(map(str, about.get("notes", ())))
    config: Any = about.get("config", {})
    return Parts(tuple(parts), str(about.get("source", "")), notes, config, _below(plan, _ORIGINAL))


def _below(plan: Plan, prefix: str) -> dict[str, Tensor]:
    mine = ((n, t) for n, t in plan.tensors.items() if n.startswith(prefix))
    return {n.removeprefix(prefix): t for n, t in mine}


def same(one: Part, other: Part) -> bool:
    """Whether two parts are equal, bit for bit."""
    if type(one) is not type(other):
        return False
    for field_ in fields(one):
        left, right = getattr(one, field_.name), getattr(other, field_.name)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            if left.shape != right.shape or not torch.equal(left, right.to(left)):
                return False
        elif left is not right and left != right:
            return False
    return True


def _part(cls: type[Part], values: Mapping[str, Any], where: str) -> Part:
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for name, value in values.items():
        if name not in known or not isinstance(value, _types(hints[name])):
            raise CorruptFileError(f"{where}: {name!r} does not fit. The file was altered.")
    try:
        return cls(**values)
    except TypeError as error:
        raise CorruptFileError(f"{where} is not whole ({error}). The file was altered.") from error


def _types(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(t for arg in get_args(hint) for t in _types(arg))
    return (float, int) if hint is float else (hint,)
