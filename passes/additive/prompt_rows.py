"""Keys and values that a model has of a real prompt, for prefixes to start from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...rewriter.edits.edit import Editor
from ...rewriter.errors import PassError
from ...rewriter.program.history import Plan
from ...rewriter.program.sites import AttentionSite
from ...rewriter.program.state import State
from ...rewriter.scores.observe import observe_keys


def with_rows_of(plan: Plan, program: State, data: Any, length: int) -> Plan:
    """A plan with the keys and values that the planned attentions have of a prompt's first
    `length` tokens, the first sample of the first batch.

    Raises:
        PassError: there is no such batch, or it is shorter.
    """
    batch = None if data is None else next(iter(data), None)
    if batch is None:
        raise PassError(
            "init=data starts from the keys and values of a prompt, and none is given. Give it as "
            "a batch of the program's inputs: run(program, ..., data=[batch])."
        )
    sites: list[Any] = [program.sites[name] for name in plan.decisions["sites"]]
    tensors: dict[str, Tensor] = {}
    for name, rows in observe_keys(program, batch, sites).items():
        if len(rows[0]) < length:
            raise PassError(
                f"init=data: {name} has {len(rows[0])} keys for the prompt that is given, and "
                f"length={length}. Give a longer prompt, or choose a smaller length."
            )
        tensors |= {f"{name}.{n}": r[:length].contiguous() for n, r in
                    zip(("key", "value"), rows, strict=True)}  # fmt: skip
    return Plan(plan.decisions, {**plan.tensors, **tensors})


def rows_of(edit: Editor, site: AttentionSite) -> tuple[Tensor, Tensor]:
    """What `with_rows_of` has found for a site, as new parameters."""
    like = edit.like(site)
    key, value = (edit.tensors[f"{site.id}.{n}"] for n in ("key", "value"))
    return key.to(like, copy=True), value.to(like, copy=True)
