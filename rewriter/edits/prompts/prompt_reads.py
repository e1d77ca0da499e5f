"""What a prompt may read: values as they are without it.

A router that chooses a prompt looks at the embeddings of the user's tokens; in the graph, the same
lookup gives the prompt's positions, too. So what only the prompt needs is computed from unpadded
inputs, and where it reads a value that the model needs, the prompt's positions are stripped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from ...errors import PassError
from ...graph.aten import ancestors, shape
from ...program.history import Attachment
from ...program.state import State
from ..calls.requirements import caller, cycle

Strip = Callable[[Node, tuple[int, ...]], Node]


def own_reads(program: State, attachment: Attachment, reads: Mapping[str, Node]) -> set[Node]:
    """The nodes that only a branch's reads need, and its adapter's shared modules among theirs."""
    prefix = ".".join(attachment.path.split(".")[:2]) + "."
    shared = {path for path in program.shared if path.startswith(prefix)}
    above = {n for read in reads.values() for n in ancestors(read)}
    own: set[Node] = set()
    for node in reversed(program.module.graph.nodes):
        if node not in above or node.op in ("placeholder", "get_attr"):
            continue
        if (node.op == "call_module" and node.target in shared) or own.issuperset(node.users):
            own.add(node)
    return own


def require_before(
    program: State, attachment: Attachment, reads: Mapping[str, Node], embedding: Node
) -> None:
    """Raises PassError where a branch in front of an embedding reads what depends on that."""
    own = own_reads(program, attachment, reads)
    for name, read in reads.items():
        for node in ancestors(read, block=lambda n: n not in own):
            if node not in own and node is not embedding and embedding in set(ancestors(node)):
                what = f"the branch {type(program.branch(attachment)).__name__}"
                through = "" if read is node else f" through {caller(program, read) or read.name}"
                value = f"{name} = {node.name}{through}"
                instead = "edit.output(site), a mask, or an input"
                raise PassError(cycle(f"{what} at {attachment.site}", value, instead))


def stripped(
    program: State,
    attachment: Attachment,
    reads: Mapping[str, Node],
    own: set[Node],
    symbol: str,
    strip: Strip,
) -> dict[str, Node]:
    """The reads of a branch without the positions of its prompt; changes what `own` reads.

    Args:
        own: see `own_reads`; the calls that are made here are added.
        symbol: the number of tokens with the prompt.
        strip: makes a call that removes the prompt's positions from axes of a value.

    Raises:
        PassError: a value has tokens on an axis with others.
    """
    copies: dict[Node, Node] = {}

    def enter(node: Node) -> Node:
        if node in own or node.op in ("placeholder", "get_attr"):
            return node
        sizes = [str(s) for s in shape(node) or ()]
        axes = tuple(a for a, s in enumerate(sizes) if s == symbol)
        if any(s != symbol and re.search(rf"\b{symbol}\b", s) for s in sizes):
            raise PassError(
                f"{attachment.site}: {node.name} [{', '.join(sizes)}] holds tokens on an axis with "
                "others, from which a prompt cannot be told. Read it where they lie apart."
            )
        if axes and node not in copies:
            copies[node] = strip(node, axes)
        return copies.get(node, node)

    for node in list(own):
        node.meta.pop("val", None)
        for source in node.all_input_nodes:
            node.replace_input_with(source, enter(source))
    entered = {name: enter(read) for name, read in reads.items()}
    own.update(copies.values())
    names = {name: read.name for name, read in entered.items()}
    program.attachments = tuple(
        replace(a, reads=names) if a.path == attachment.path else a for a in program.attachments
    )
    return entered


def first_of(gm: GraphModule, nodes: Mapping[Node, None]) -> Node:
    """Which of some nodes stands first in the graph."""
    return next(n for n in gm.graph.nodes if n in nodes)
