"""Which tokens of hidden states are padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ...axes.line import Line
from ...errors import PassError
from ...graph.aten import ATEN, is_op, placeholders, shape, submodule, users, value
from ...program.state import State
from ..calls.call import Value
from ..calls.samples import ShownAxes
from ..prompts.pads import PadTokens
from ..prompts.tokens import meaning_of


def valid_of(program: State, axes: ShownAxes, states: Node) -> Value | None:
    """Which tokens of hidden states are real, bool `[batch, tokens]`; None if none is padding.

    Raises:
        PassError: there is a mask, and it is not known along which of its axes samples lie.
    """
    size = shape(states)
    if size is None:
        raise PassError(f"{states.name} has no recorded shape.")
    sizes = {program.symbols.get(str(s), str(s)) for s in size}
    masks = list(_masks(program, sizes))
    for source, padded in masks:
        given = [program.symbols.get(str(s), str(s)) for s in shape(padded) or ()]
        batch = _batch(axes, padded)
        if batch is None:
            why = axes.samples.reason or "its axes are not those of samples and their tokens"
            raise PassError(
                f"the padding mask {source.name!r} is [{', '.join(given)}]: {why}. "
                f"{axes.samples.remedy or 'Capture with a mask that is [batch, tokens].'}"
            )
        if given[1 - batch] not in sizes:
            continue
        its = _is_of(program, axes.line(padded, 1 - batch), source, states)
        if its is None and len(masks) > 1:
            names = " or ".join(repr(m.name) for m, _ in masks)
            raise PassError(
                f"nothing shows whether {names} is the padding mask of {states.name}. Capture with "
                "sizes of their own for both: dynamic={input: {axis: name}}."
            )
        if its is not False:
            return _real(source, padded, batch)
    return None


def _masks(program: State, sizes: set[str]) -> Iterator[tuple[Node, Node]]:
    """The padding masks that have one of some sizes, each with what a prompt made of it."""
    gm = program.module
    for source in placeholders(gm).values():
        padded = next((u for u in users(source) if isinstance(submodule(gm, u), PadTokens)), source)
        given = [program.symbols.get(str(s), str(s)) for s in shape(padded) or ()]
        if (
            len(given) == 2
            and not sizes.isdisjoint(given)
            and meaning_of(program, source) == "mask"
        ):
            yield source, padded


def _is_of(program: State, line: Line, mask: Node, states: Node) -> bool | None:
    """Whether a mask, whose tokens are followed, is that of the stream of some states; None if
    nothing tells, also where nothing shows whose it is."""
    if line.reaches(states) is not False:
        return line.reaches(states)
    others = (s for s in placeholders(program.module).values() if s is not mask)
    return False if any(line.reaches(s) is True for s in others) else None


def _batch(axes: ShownAxes, mask: Node) -> int | None:
    """The axis of the samples in a mask of two axes."""
    if axes.samples.size == 1:
        return next((k for k, size in enumerate(shape(mask) or ()) if size == 1), None)
    return axes.named.place(mask, "batch")


def _real(source: Node, padded: Node, batch: int) -> Node:
    """`padded != 0`, `[batch, tokens]`; one node however often it is asked for."""
    name = f"valid_{source.name}"
    known = next((u for u in users(padded) if u.name.startswith(name)), None)
    if known is None:
        known = _call(padded, ATEN.ne.Scalar, name)
    if batch == 0:
        return known
    turned = next((u for u in users(known) if is_op(u, ATEN.transpose.int)), None)
    return turned or _call(known, ATEN.transpose.int, f"{name}_by_sample")


def _call(source: Node, operator: object, name: str) -> Node:
    args = (source, 0) if operator is ATEN.ne.Scalar else (source, 0, 1)
    with source.graph.inserting_after(source):
        node = source.graph.create_node("call_function", operator, args, {}, name=name)  # pyright: ignore
    with value(source).fake_mode:
        mask = value(source)
        node.meta["val"] = torch.ne(mask, 0) if operator is ATEN.ne.Scalar else mask.mT
    return node
