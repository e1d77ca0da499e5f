"""Weights in another format: what a format stores takes the place of one tensor.

The parameter `name` leaves the program; its parts (`name.codes`, `name.scale`, ...) take its place,
see `forms`. Sites, branches and patterns see a weight as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ...errors import ExportError, PassError
from ...files.identity import merkle_root, tensor_digest
from ...graph.aten import SLICES, VIEWS, expression_of, is_op, shape, users
from ...graph.stored_call import StoredCall
from ...graph.weighted_call import linear_call, linear_parts
from ...measure.compare import all_finite
from ...program.sites import LinearSite, WeightSite
from ...weights.format import Format, format_of
from ...weights.weight import put_format
from ..calls.attach import Attaching
from .compose import compose
from .forms import replace_call, store_as


def repack(edit: Attaching, layouts: Sequence[str]) -> tuple[set[str], dict[str, list[str]]]:
    """Stores every weight as another runtime takes it, and lets the linears of formats that it does
    not have multiply by the dense weight, computed anew.

    Returns:
        The layouts that are there, and the weights that have none, by what their format is.

    Raises:
        ExportError: see `Format.pack`.
    """
    graph = edit.graph_module.graph
    linears = [s for s in edit.program.sites if isinstance(s, LinearSite)]
    named = {name: site for site in linears for name in site.nodes}
    packed: dict[str, tuple[str, Format]] = {}
    left: dict[str, list[str]] = {}
    for name, site in named.items():
        call = edit.node(name)
        stored = StoredCall.of(call)
        if stored is None:
            continue
        if site.weight not in packed:
            packed[site.weight] = _laid_out(edit, site, layouts)
        layout, form = packed[site.weight]
        if layout:
            stored.with_numbers(form.integers).write(call)
            continue
        left.setdefault(form.said, []).append(site.weight)
        with graph.inserting_before(call):
            dense = graph.call_function(*stored.dense(site.in_features))
            new = linear_call(graph, stored.x, dense, stored.bias)
        replace_call(graph, call, new)
    edit.refresh()
    return {layout for layout, _ in packed.values() if layout}, left


def _laid_out(edit: Attaching, site: LinearSite, layouts: Sequence[str]) -> tuple[str, Format]:
    """Stores one weight in the first of some layouts that its format has; which one, '' for none,
    and the format then."""
    weight = edit.weight(site)
    for layout in layouts:
        try:
            form = weight.format.pack(layout)
        except ExportError as error:
            raise ExportError(f"{site.weight}: {error}") from error
        if form is not None:
            tensors = replace(weight, format=form).tensors()
            put_format(edit.graph_module, site.weight, tensors)
            return layout, form
    return "", weight.format


def whole_weights(edit: Attaching, ids: Sequence[str]) -> list[WeightSite]:
    """See `Editor.whole`."""
    chosen = {i: s for i in ids if isinstance(s := edit.program.sites[i], WeightSite)}
    sites: dict[str, WeightSite] = {}
    for site in chosen.values():
        same = [s for s in edit.program.sites.of(site.kind) if isinstance(s, WeightSite)]
        rest = [s.id for s in same if s.weight == site.weight and s.id not in chosen]
        if rest:
            edit.skip(site, f"{site.weight} also holds {', '.join(rest)}: select all or none of it")
        else:
            sites.setdefault(site.weight, site)
    return list(sites.values())


def quantise_weight(
    edit: Attaching, site: WeightSite, operator: Any, options: Mapping[str, Any]
) -> bool:
    """See `Editor.quantise`."""
    if reason := edit.obstacle(site):
        edit.skip(site, reason)
        return False
    weight = edit.weight(site)
    if not weight.is_dense:
        raise PassError(f"{site.id} is quantised already. Select other sites with where=.")
    for name in site.nodes:
        compose(edit.program, edit.node(name), site.weight)  # a lowered call becomes a linear
    edit.refresh()
    calls = [edit.node(name) for name in site.nodes]
    trained = site.weight in edit.program.tensors.trained
    reason = f"{site.weight} trains as it is" if trained else _obstacle(edit, site, calls)
    if reason:
        edit.skip(site, reason)
        return False
    dense = weight.dense()
    if not dense.is_meta and not all_finite(dense):
        raise PassError(f"{site.weight} holds NaN or infinity; it cannot be quantised.")
    stored = weight.in_format(format_of(operator._schema.name), **options)
    _require_known(edit, site.weight, stored.format)
    for call in store_as(edit, site, stored):
        compose(edit.program, call, site.weight)
    edit.refresh()
    edit.edited.append(site.id)
    return True


def _require_known(edit: Attaching, name: str, form: Format) -> None:
    """Records the digest of a weight's integers, or compares it with what the plan says."""
    if form.device.type == "meta":
        return
    digest = merkle_root({n: tensor_digest(t) for n, t in form.fixed.items()})
    known: dict[str, str] = edit.decided.setdefault("codes", {})
    if known.setdefault(name, digest) != digest:
        raise PassError(
            f"{name}: rounding the base weight gives other integers than those that the scales "
            "were trained with. Load the base that it was trained on, with the version of peftfx "
            "that saved it."
        )


def _obstacle(edit: Attaching, site: WeightSite, calls: Sequence[Node]) -> str:
    """Why a site's weight cannot be stored in another format; empty if it can."""
    if site.tied:
        return f"its weight is tied to {', '.join(site.tied)}"
    if site.left and isinstance(site, LinearSite):
        return "its calls multiply from the left (W @ x)"
    keys = {call.meta.get("call") or call.name for call in calls}
    stack = list(edit.graph_module.graph.find_nodes(op="get_attr", target=site.weight))
    while stack:
        for reader in users(stack.pop()):
            if is_op(reader, VIEWS) or is_op(reader, SLICES):
                stack.append(reader)
            elif expression_of(reader) is not None:
                return f"its weight is computed afresh by {reader.name}; fold that adapter first"
            elif reader not in calls and reader.meta.get("composed") not in keys:
                return f"its weight is also read by {reader.name}"
    for call in calls if isinstance(site, LinearSite) else ():
        x, _, bias = linear_parts(call) or (None, None, None)
        flat = bias is None or len(shape(bias) or ()) == 1
        if x is None or not flat or set(call.kwargs) - {"bias"}:
            return f"{call.name} is not a plain linear"
    return ""
