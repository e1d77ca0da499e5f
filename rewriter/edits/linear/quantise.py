"""Quantised weights: integers, scales and zero points in the place of one tensor.

The parameter `name` leaves the program; `name.codes`, `name.scale` and `name.zero` take its place
and the linear's calls become `operator(x, codes, scale, zero, bias, bits, group)`. Sites, branches
and patterns see a linear as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...errors import PassError
from ...files.identity import merkle_root, tensor_digest
from ...graph.aten import (
    SLICES,
    VIEWS,
    is_op,
    set_attribute,
    shape,
    users,
)  # fmt: skip
from ...graph.flow import site_nodes
from ...graph.quantised_call import QuantisedCall
from ...graph.weighted_call import linear_parts
from ...measure.compare import all_finite
from ...program.sites import LinearSite
from ...weights.integers import Quantised, quantise
from ...weights.quantised import QuantisedWeight
from ..calls.attach import Attaching
from .compose import compose


def repack(edit: Attaching, layout: str) -> bool:
    """Stores every quantised weight as another runtime takes it; returns whether there is one.

    Raises:
        ExportError: see `QuantisedWeight.pack`.
    """
    nodes = site_nodes(edit.graph_module)
    found: dict[str, Quantised] = {}
    for site in edit.program.sites:
        weight = edit.weight(site) if isinstance(site, LinearSite) else None
        if not isinstance(site, LinearSite) or not isinstance(weight, QuantisedWeight):
            continue
        if site.weight not in found:
            found[site.weight] = weight.pack(layout)
            replace_tensor(edit.graph_module, site.weight, found[site.weight])
        for name in site.nodes:
            call = QuantisedCall.of(nodes[name])
            if call is not None:
                call._replace(group=found[site.weight].group).write(nodes[name])
    return bool(found)


def whole_weights(edit: Attaching, ids: Sequence[str]) -> list[LinearSite]:
    """See `Editor.whole`."""
    chosen = {i: s for i in ids if isinstance(s := edit.program.sites[i], LinearSite)}
    found: dict[str, LinearSite] = {}
    for site in chosen.values():
        same = [s for s in edit.program.sites if isinstance(s, LinearSite)]
        rest = [s.id for s in same if s.weight == site.weight and s.id not in chosen]
        if rest:
            edit.skip(site, f"{site.weight} also holds {', '.join(rest)}: select all or none of it")
        else:
            found.setdefault(site.weight, site)
    return list(found.values())


def quantise_weight(
    edit: Attaching,
    site: LinearSite,
    bits: int,
    group: int | None,
    operator: Callable[..., Tensor],
    real_zeros: bool,
) -> bool:
    """See `Editor.quantise`."""
    gm = edit.graph_module
    weight = edit.weight(site)
    if isinstance(weight, QuantisedWeight):
        raise PassError(f"{site.id} is quantised already. Select other sites with where=.")
    for name in site.nodes:
        compose(edit.program, edit.node(name), site.weight)  # a lowered call becomes a linear
    nodes = site_nodes(gm)
    calls = [nodes[name] for name in site.nodes]
    trained = site.weight in edit.program.tensors.trained
    reason = f"{site.weight} trains as it is" if trained else _obstacle(gm, site, calls)
    if reason:
        edit.skip(site, reason)
        return False
    dense = weight.dense()
    if not dense.is_meta and not all_finite(dense):
        raise PassError(f"{site.weight} holds NaN or infinity; it cannot be quantised.")
    made = quantise(dense, bits, group)
    _require_known(edit, site.weight, made)
    if real_zeros:
        made = replace(made, zero=made.zeros())
    parts = [linear_parts(call) for call in calls]
    replace_tensor(gm, site.weight, made)
    for call, found in zip(calls, parts, strict=True):
        if found is None:
            raise PassError(f"{site.id}: {call.name} is not a linear.")
        x, _, bias = found
        with gm.graph.inserting_before(call):
            codes, scale, zero = (gm.graph.get_attr(f"{site.weight}.{p}") for p in PARTS)
            operands = tuple(QuantisedCall(x, codes, scale, zero, bias, made.bits, made.group))
            new = gm.graph.create_node("call_function", operator, operands, {}, "quantised_linear")
        new.meta = {**call.meta, "call": call.meta.get("call", call.name)}
        call.replace_all_uses_with(new)
        gm.graph.erase_node(call)
        new.name = new.meta["call"]  # sites name it so, also in files
        compose(edit.program, new, site.weight)
    edit.edited.append(site.id)
    return True


def _require_known(edit: Attaching, name: str, made: Quantised) -> None:
    """Records the digest of a weight's integers, or compares it with what the plan says."""
    if made.codes.is_meta:
        return
    digest = merkle_root({"codes": tensor_digest(made.codes), "zero": tensor_digest(made.zero)})
    known: dict[str, str] = edit.decided.setdefault("codes", {})
    if known.setdefault(name, digest) != digest:
        raise PassError(
            f"{name}: rounding the base weight gives other integers than those that the scales "
            "were trained with. Load the base that it was trained on, with the version of peftfx "
            "that saved it."
        )


PARTS = ("codes", "scale", "zero")
"""What stands below a quantised weight's name, in the operator's order."""


def replace_tensor(gm: GraphModule, name: str, made: Quantised) -> None:
    """Stores a quantised matrix under a weight's name, in the place of what is there."""
    path, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(path)
    owner._parameters.pop(leaf, None)
    owner._modules.pop(leaf, None)
    set_attribute(gm, f"{name}.codes", made.codes, transient=False)
    set_attribute(gm, f"{name}.scale", nn.Parameter(made.scale, requires_grad=False))
    zero = nn.Parameter(made.zero, requires_grad=False) if made.zero.is_floating_point() else None
    set_attribute(gm, f"{name}.zero", made.zero if zero is None else zero, transient=False)


def _obstacle(gm: GraphModule, site: LinearSite, calls: Sequence[Node]) -> str:
    """Why a site's weight cannot be stored as integers; empty if it can."""
    if site.obstacle:
        return site.obstacle
    if site.tied:
        return f"its weight is tied to {', '.join(site.tied)}"
    if site.left:
        return "its calls multiply from the left (W @ x)"
    keys = {call.meta.get("call") or call.name for call in calls}
    stack = list(gm.graph.find_nodes(op="get_attr", target=site.weight))
    while stack:
        for reader in users(stack.pop()):
            if is_op(reader, VIEWS) or is_op(reader, SLICES):
                stack.append(reader)
            elif reader not in calls and reader.meta.get("composed") not in keys:
                return f"its weight is also read by {reader.name}"
    for call in calls:
        x, _, bias = linear_parts(call) or (None, None, None)
        flat = bias is None or len(shape(bias) or ()) == 1
        if x is None or not flat or set(call.kwargs) - {"bias"}:
            return f"{call.name} is not a plain linear"
    return ""
