"""Several branches of one site combined by another, and other adapters' parameters held still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from ...branches.branch import Serial
from ...errors import PassError
from ...graph.aten import ATEN, ancestors, value
from ...program.history import Attachment
from ...program.sites import Site
from ...program.state import BRANCHES
from ..calls.attach import Attaching
from ..calls.call import branch_call, move_before


def member_paths(edit: Attaching, site: Site, members: Sequence[str]) -> tuple[str, ...]:
    """The paths of the branches that the named adapters have at a site, one each.

    Raises:
        PassError: an adapter has none there, or one that cannot be combined.
    """
    return tuple(_member(edit, site, name).path for name in members)


def _member(edit: Attaching, site: Site, name: str) -> Attachment:
    attachments = edit.program.attachments
    here = [a for a in attachments if a.site == site.id and a.slot in ("serial", "delta")]
    attachment = next((a for a in here if a.path.startswith(f"{BRANCHES}.{name}.")), None)
    if attachment is None:
        raise PassError(
            f"the adapter {name!r} has no branch to combine at {site.id}. Adapters with one: "
            f"{', '.join(dict.fromkeys(a.adapter for a in here)) or 'none'}."
        )
    owner = next((a for a in attachments if attachment.path in a.members), None)
    if owner is not None:
        raise PassError(
            f"the adapter {owner.adapter!r} combines the branch of {name!r} at {site.id} already. "
            "Remove it first: program.without(...)."
        )
    branch = edit.program.branch(attachment)
    if isinstance(branch, Serial) and type(branch).update is Serial.update:
        raise PassError(
            f"{type(branch).__name__} of {name!r} at {site.id} cannot be combined: it does not "
            "add to the value that it reads. Combine adapters with a skip connection."
        )
    return attachment


def combine_serial(
    edit: Attaching, site: Site, path: str, members: Sequence[str], reads: Mapping[str, Node]
) -> None:
    """Puts a combining call where the first of the members stands; see `Editor.combine`.

    All members then read what the first of them read, and so does what they and the combining
    branch read beside it; branches between and behind them stay behind.
    """
    graph = edit.graph_module.graph
    calls = {str(n.target): n for n in graph.nodes if n.op == "call_module" and n.target in members}
    first, *rest = calls.values()
    h: Any = first.args[0]
    for call in rest:
        call.replace_all_uses_with(call.args[0])  # pyright: ignore[reportArgumentType]
    beside = {v for c in rest for v in c.kwargs.values() if isinstance(v, Node)} | {*reads.values()}
    above = {n for read in beside for n in ancestors(read)}
    for reader in [u for u in first.users if u in above]:
        reader.replace_input_with(first, h)
    readers = list(first.users)
    for value_read in beside:
        move_before(value_read, first)
    last = first
    for call in rest:
        last.append(call)
        last = call
    for call in calls.values():
        call.args, call.kwargs = (h,), {**call.kwargs, "skip": False}
        call.meta.pop("serial")
    with graph.inserting_after(last):
        update = branch_call(edit.graph_module, path, (h, *(calls[p] for p in members)), reads)
    with graph.inserting_after(update):
        added = (ATEN.add.Tensor, (h, update), {}, f"{update.name}_add")
        joined = graph.create_node("call_function", *added)
    joined.meta |= {"serial": site.id, "previous": value(first)}
    for reader in readers:
        reader.replace_input_with(first, joined)


def hold(edit: Attaching, adapters: Sequence[str]) -> None:
    """See `Editor.hold`."""
    owned = edit.program.owned
    kept = {n for adapter, names in owned.items() if adapter not in adapters for n in names}
    names = {n for adapter in adapters for n in owned.get(adapter, ())} - kept
    prefixes = tuple(f"{BRANCHES}.{adapter}." for adapter in adapters)
    for name, parameter in edit.graph_module.named_parameters():
        if name in names or name.startswith(prefixes):
            parameter.requires_grad_(False)
