"""Where a stream begins: what its first sublayer adds to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ...errors import PassError
from ...graph.aten import ATEN, ancestors, value
from ...program.sites import EmbeddingSite, LinearSite, NormSite, SublayerSite
from ...program.state import State
from ..calls.call import branch_call, latest
from ..calls.values import input_of
from ..prompts.positions import angles
from .region import stream_before


def stream_start(program: State, site: EmbeddingSite, nodes: Mapping[str, Node]) -> Node:
    """The value that the rows of a table have become where the first sublayer adds to them.

    Raises:
        PassError: the table begins several streams or none, or its rows go through a linear, or
            through a norm of another module than the table's.
    """
    tables = {nodes[name] for name in site.nodes}
    for sublayer in program.sites:
        if not isinstance(sublayer, SublayerSite):
            continue
        parallel = sublayer.parallel
        start = stream_before(program, sublayer, nodes) if parallel else input_of(sublayer, nodes)
        between = set(ancestors(start, block=lambda n: n in tables))
        if tables & between:
            _require_alone(program, site, {n.name for n in between})
            return start
    raise PassError(f"{site.id} begins no stream of sublayers. Choose another table with where=.")


def _require_alone(program: State, site: EmbeddingSite, between: set[str]) -> None:
    if len(site.nodes) > 1:
        raise PassError(
            f"{site.id} begins {len(site.nodes)} streams, and a branch stands at one. Choose a "
            "model with one stack of layers."
        )
    owner = site.module.rpartition(".")[0]
    for other in program.sites:
        foreign = isinstance(other, NormSite) and not other.weight.startswith(f"{owner}.")
        if (foreign or isinstance(other, LinearSite)) and between & {*other.nodes}:
            raise PassError(
                f"{site.id}: its rows go through {other.id} before the first sublayer, so that the "
                "stream does not begin behind the embeddings. Use a model where it does."
            )


def keep_positions(program: State, length: int) -> None:
    """Counts tokens behind a prompt as if it were not there; its own rows read no positions.

    Raises:
        PassError: attention itself reads positions.
    """
    gm = program.module
    if any(s.kind == "embedding" and s.role == "relative" for s in program.sites) or any(
        True for _ in angles(gm)
    ):
        raise PassError(
            "attention reads positions, and a prompt where the stream begins has none. Use one in "
            "front of the input."
        )
    for site in program.sites:
        if site.kind != "embedding" or site.role != "position":
            continue
        for node in (n for n in list(gm.graph.nodes) if n.name in site.nodes):
            given: Any = node.args[1]
            rows = isinstance(given, list | tuple)  # `table[positions]` instead of a lookup
            with gm.graph.inserting_before(node):
                moved = gm.graph.call_function(
                    ATEN.sub.Tensor, (given[0] if rows else given, length)
                )
                kept = gm.graph.call_function(ATEN.clamp_min.default, (moved, 0))
            node.update_arg(1, [kept] if rows else kept)


def put_behind(program: State, start: Node, path: str, reads: Mapping[str, Node]) -> Node:
    """Calls a branch on a value, and gives the result to all that read it."""
    gm = program.module
    with gm.graph.inserting_after(latest(gm, {"": start, **reads})):
        call = branch_call(gm, path, (start,), reads)
    call.meta["val"] = value(start)
    start.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    program.attachments = tuple(
        replace(a, reads={k: call.name if n == start.name else n for k, n in a.reads.items()})
        for a in program.attachments
    )
    return call
