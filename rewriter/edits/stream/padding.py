"""Which tokens of hidden states are padding."""

from __future__ import annotations

import torch
from torch.fx import Node

from ...errors import PassError
from ...graph.aten import ATEN, placeholders, shape, submodule, users, value
from ...program.state import State
from ..calls.call import Value
from ..calls.samples import sample_axis
from .tokens import PadTokens, meaning_of


def valid_of(program: State, states: Node) -> Value | None:
    """Which tokens of hidden states are real, bool `[batch, tokens]`; None if none is padding."""
    gm = program.module
    size = shape(states)
    if size is None:
        raise PassError(f"{states.name} has no recorded shape.")
    sizes = {program.symbols.get(str(s), str(s)) for s in size}
    for source in placeholders(gm).values():
        padded = next((u for u in users(source) if isinstance(submodule(gm, u), PadTokens)), source)
        given = shape(padded)
        if given is None or len(given) != 2 or isinstance(given[1], int):
            continue
        if program.symbols.get(str(given[1])) not in sizes or meaning_of(program, source) != "mask":
            continue
        if program.symbols[str(given[1])] in sample_axis(program).names:
            raise PassError(
                f"the padding mask {source.name!r} is [tokens, batch], which branches that average "
                "over tokens do not read. Capture with a mask that is [batch, tokens]."
            )
        name = f"valid_{source.name}"
        known = next((u for u in users(padded) if u.name.startswith(name)), None)
        if known is None:
            with gm.graph.inserting_after(padded):
                args = (padded, 0)
                known = gm.graph.create_node("call_function", ATEN.ne.Scalar, args, {}, name=name)
            with value(padded).fake_mode:
                known.meta["val"] = torch.ne(value(padded), 0)
        return known
    return None
