"""Adapters in parts as plans: what the pass `imported` inserts, and what is replayed of it.

All libraries' files are read into parts and written from them (`exporters/formats.py`).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import CorruptFileError
from ..parts.parts import PARTS, Part
from ..program.history import Plan

_ORIGINAL = "original."
_SAME = "same"
"""What says that several parts share a tensor: the place of the first."""


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
    places: dict[int, str] = {}
    for index, part in enumerate(parts.parts):
        values = {f.name: getattr(part, f.name) for f in fields(part)}
        own = {n: v for n, v in values.items() if isinstance(v, Tensor)}
        for name, tensor in own.items():
            values[name] = {_SAME: places.setdefault(id(tensor), f"{index}.{name}")}
        tensors |= {p: t for n, t in own.items() if (p := values[n][_SAME]) == f"{index}.{n}"}
        fresh = {n for n in own if values[n][_SAME] == f"{index}.{n}"}
        listed.append({"kind": part.kind} | {n: v for n, v in values.items() if n not in fresh})
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
        values |= {n: _found(plan, v, where) for n, v in values.items() if isinstance(v, Mapping)}
        values |= _below(plan, f"{index}.")
        parts.append(_part(cls, values, where))
    about = plan.decisions
    notes = tuple(map(str, about.get("notes", ())))
    config: Any = about.get("config", {})
    return Parts(tuple(parts), str(about.get("source", "")), notes, config, _below(plan, _ORIGINAL))


def _below(plan: Plan, prefix: str) -> dict[str, Tensor]:
    mine = ((n, t) for n, t in plan.tensors.items() if n.startswith(prefix))
    return {n.removeprefix(prefix): t for n, t in mine}


def _found(plan: Plan, said: Mapping[str, Any], where: str) -> Tensor:
    """The tensor that a part shares with an earlier one."""
    tensor = plan.tensors.get(str(said.get(_SAME)))
    if tensor is None:
        raise CorruptFileError(f"{where} shares a tensor that is not there. The file was altered.")
    return tensor


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
