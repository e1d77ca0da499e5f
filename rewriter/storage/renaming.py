"""A saved adapter under another name, so that two of one name fit into one program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import OptionError
from ..pipeline.passes import Pass
from ..program.history import Plan
from ..program.state import BRANCHES
from .artifact import Artifact


def renamed(artifact: Artifact, name: str, where: str) -> Artifact:
    """An artifact whose one adapter has another name.

    Raises:
        OptionError: it holds several, or `name` is none.
    """
    if len(artifact.adapters) != 1:
        raise OptionError(
            f"{where} holds {len(artifact.adapters)} adapters ({', '.join(artifact.adapters)}), so "
            f"name={name!r} cannot be given to one. Save them one by one: "
            "save(program, directory, adapters=[...])."
        )
    (old,) = artifact.adapters
    before, after = (f"{BRANCHES}.{n}." for n in (old, name))

    def text(word: str) -> str:
        return after + word.removeprefix(before) if word.startswith(before) else word

    def value(item: Any) -> Any:
        if isinstance(item, str):
            return text(item)
        if isinstance(item, Mapping):
            return {text(k): value(v) for k, v in item.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return [value(i) for i in item] if isinstance(item, list) else item  # pyright: ignore[reportUnknownVariableType]

    def step(item: Pass) -> Pass:
        if item.adapter == old:
            return replace(item, name=name)
        names: Any = getattr(item, "names", None)
        return replace(item, names=(name,)) if names == (old,) else item

    steps = tuple(
        (step(item), Plan(value(plan.decisions), value(plan.tensors)), said)
        for item, plan, said in artifact.steps
    )
    return replace(artifact, adapters=(name,), steps=steps, tensors=value(artifact.tensors))
