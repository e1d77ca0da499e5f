"""What the editor's words ask of a method, and what an error says where a method breaks that.

A rule that is broken shows late: as a malformed graph, or as torch's own error about shapes. The
messages here name the method, the site, and what to write instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch.fx import Node

from ...branches.branch import (
    Branch,
    Combine,
    Delta,
    Expression,
    InputScale,
    OutputScale,
    RowScale,
    Serial,
)
from ...branches.input_map import InputMap
from ...branches.input_shift import InputShift, OutputShift
from ...branches.prompts import KeyValue, Tokens
from ...branches.routing import Inserted, Routed
from ...errors import PassError
from ...graph.aten import ancestors
from ...program.sites import Site
from ...program.state import State

_WORDS: dict[type[Branch], str] = {
    Delta: "add", InputScale: "scale", OutputScale: "scale", RowScale: "rescale",
    InputShift: "shift", OutputShift: "shift", InputMap: "map",
    Expression: "express", Serial: "after", Combine: "combine", KeyValue: "prepend_kv",
    Tokens: "prepend_tokens", Routed: "wrap", Inserted: "insert_tokens",
}  # fmt: skip
"""Kind of branch -> the editor's word that inserts it."""

_WEIGHTS = ("linear", "conv", "embedding", "experts")
_KINDS = {
    "add": _WEIGHTS, "scale": _WEIGHTS, "rescale": _WEIGHTS, "after": ("sublayer", "embedding"),
    "shift": ("linear", "embedding"), "map": _WEIGHTS,
    "combine": ("linear", "sublayer"), "prepend_kv": ("attention",),
    "prepend_tokens": ("embedding",), "wrap": ("sublayer",), "insert_tokens": ("sublayer",),
}  # fmt: skip
"""Word -> the kinds of sites that it takes; `express` takes all."""


def require_fit(method: str, word: str, site: Site, branch: Any) -> None:
    """Raises PassError unless `edit.<word>` inserts such a branch at such a site."""
    wanted = [kind for kind, its in _WORDS.items() if its == word]
    if not isinstance(branch, tuple(wanted)):
        names = " or ".join(kind.__name__ for kind in wanted)
        right = next((its for kind, its in _WORDS.items() if isinstance(branch, kind)), None)
        remedy = f"Use edit.{right} for it" if right else f"Let it subclass {names}"
        raise PassError(
            f"{method}: edit.{word} at {site.id} takes a {names}, and {type(branch).__name__} is "
            f"none. {remedy}."
        )
    kinds = _KINDS.get(word, (site.kind,))
    if site.kind not in kinds:
        raise PassError(
            f"{method}: edit.{word} takes {' or '.join(kinds)} sites, and {site.id} is of kind "
            f"{site.kind}. Set kinds = ({', '.join(repr(k) for k in kinds)},) in the method, or "
            "use the word for such sites."
        )


def require_axes(method: str, site: Site, branch: Branch, reads: Collection[str]) -> None:
    """Raises PassError where a branch declares axes that its tensors do not have."""
    tensors = {**dict(branch.named_parameters()), **dict(branch.named_buffers())}
    what = f"{method}: {type(branch).__name__} at {site.id}"
    for name, labels in branch.axes.items():
        if labels[:1] == ("...",):
            continue
        owner, _, leaf = name.rpartition(".")
        stacked = branch.shape.count > 1  # one part for each matrix, on an axis in front or not
        ranks = (len(labels), len(labels) + stacked)
        if name in tensors and tensors[name].dim() not in ranks:
            raise PassError(
                f"{what} says that the axes of {name} are {labels}, but it is "
                f"{list(tensors[name].shape)}. Give one word for each axis in Branch.axes, a tuple "
                "of words for a product."
            )
        if name not in tensors and name not in reads and not owner and not hasattr(branch, leaf):
            raise PassError(
                f"{what} declares axes of {name!r}, which is none of its tensors "
                f"({', '.join(tensors) or 'none'}) and nothing that it reads. Use their names in "
                "Branch.axes."
            )


def require_names(method: str, site: Site, names: Sequence[str]) -> None:
    """Raises PassError unless `edit.express` is given one stored tensor, or different ones."""
    if not names or len(set(names)) < len(names):
        raise PassError(
            f"{method}: edit.express at {site.id} is to compute {', '.join(names) or 'nothing'}. "
            "Name one stored tensor, or several different ones."
        )


def require_order(program: State, method: str) -> None:
    """Raises PassError where a call reads a value that is computed only after it."""
    order = {node: place for place, node in enumerate(program.module.graph.nodes)}
    for node, place in order.items():
        late = next((read for read in node.all_input_nodes if order[read] > place), None)
        if late is not None:
            raise PassError(f"{method}: {_too_late(program, node, late)}")


def _too_late(program: State, node: Node, late: Node) -> str:
    if not caller(program, node) and caller(program, late):  # what it reads is behind its own value
        for name, read in late.kwargs.items():
            if isinstance(read, Node) and node in set(ancestors(read)):
                value = f"{name} = {read.name}"
                return cycle(caller(program, late), value, "values of earlier sites")
    names = [name for name, read in node.kwargs.items() if read is late]
    value = f"{names[0]} = {late.name}" if names else late.name
    what = caller(program, node) or f"the call {node.name}"
    if node in set(ancestors(late)):
        return cycle(what, value, "edit.input(site), or values of earlier sites")
    return (
        f"{what} reads {value}, which is computed only later. What a branch reads must be known "
        "where its site runs: edit.input(site), or values of earlier sites, alone or through "
        "edit.share."
    )


def cycle(what: str, value: str, instead: str) -> str:
    """What an error says where a branch reads what depends on the branch itself."""
    return (
        f"{what} reads {value}, which depends on what this changes: a cycle. Read {instead}, alone "
        "or through edit.share. Leave the site out with where= if it is none of yours."
    )


def caller(program: State, node: Node) -> str:
    """`the branch ToyBranch at layers.0.query.weight`, for the call of one; else empty."""
    if node.op != "call_module":
        return ""
    for attachment in program.attachments:
        if attachment.path == node.target:
            kind = type(program.branch(attachment)).__name__
            return f"the branch {kind} at {attachment.site}"
    return f"the shared module {node.target}" if node.target in program.shared else ""


def failing_branch(program: State, node: Node, cause: str, said: str) -> str:
    """What an error says of a node that a branch makes fail; empty if none does.

    Args:
        node: its call, or what reads its output.
        cause: `value` where its forward decides by the value of a tensor, `size` where it fixes a
            dynamic size, else `shape`.
        said: torch's error.
    """
    line = said.strip().splitlines()[0] if said.strip() else "no reason given"
    if what := caller(program, node):
        if cause == "value":
            return (
                f"{what} decides by the value of a tensor (if, while, bool()), which one "
                "graph for all inputs cannot. Use torch.where or a product with a mask in its "
                "forward, or decide in plan()."
            )
        if cause == "size":
            return (
                f"{what} fixes a dynamic size: {line} Its forward must work for any number of rows "
                "and tokens: use -1 in view, and sizes of its operand."
            )
        given = ", ".join(_shape(a) for a in node.all_input_nodes)
        return (
            f"{what} fails on what it reads ({given}): {line} Its forward must take the features "
            "on the last axis, and any number of axes before it."
        )
    if "composed" not in node.meta:
        return ""
    calls = [(c, read) for read in node.all_input_nodes if (c := caller(program, read))]
    if not calls:
        return ""
    what, read = calls[-1]
    others = [_shape(a) for a in node.all_input_nodes if a is not read]
    return (
        f"{what} returns {_shape(read)}, which cannot be added to {', '.join(others)}. Return the "
        "shape of what the linear returns: its out_features on the last axis."
    )


def _shape(node: Node) -> str:
    size: Sequence[Any] | None = getattr(node.meta.get("val"), "shape", None)
    return node.name if size is None else f"[{', '.join(str(s) for s in size)}]"
