"""Cutting channels: every tensor, branch, size and site that has a part in them shrinks together.

`channels` (`axes.py`) says which indices of which axes are one channel; here they go. The result
computes what the program computes with those channels masked to zero at every contraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...axes.gathers import each
from ...axes.relation import Ref, owner
from ...axes.ties import EXPANSIONS, divides
from ...axes.views import DIVISIONS, pieces, span
from ...branches.branch import Branch, RowScale
from ...errors import PassError
from ...graph.aten import (
    ATEN,
    CONVS,
    attribute,
    is_op,
    named_arguments,
    overloads,
    set_attribute,
    submodule,
)
from ...graph.stored_call import Lookup, Unpacked
from ...program.site_table import Sites
from ...program.sites import (
    AttentionSite,
    ConvSite,
    EmbeddingSite,
    ExpertsSite,
    LinearSite,
    NormSite,
    Site,
    SublayerSite,
)
from ...program.state import State
from ...weights.weight import Weight, put_format, stored_weights
from .axes import Channels

_SPANS = overloads("slice", "narrow")
_LISTS = overloads(
    "view",
    "reshape",
    "_unsafe_view",
    "expand",
    "broadcast_to",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
_NORMS = overloads("layer_norm", "rms_norm")


def cut_channels(program: State, group: Channels, keep: Sequence[int]) -> None:
    """Removes all channels of a group but `keep`, in place.

    Raises:
        PassError: nothing or something unknown is kept, channels that are coupled would be parted,
            or an operator's sizes or a site cannot follow.
    """
    kept = _kept(group, keep)
    left = {ref: (labels < 0) | kept[labels] for ref, labels in group.labels.items()}
    gm, weights = program.module, stored_weights(program)
    for node in list(gm.graph.nodes):
        _resize(node, left)
    touched = {tensor_name for tensor_name, _ in left}
    for name, axes in group.stored.items():
        own = {axis: left[name, axis] for axis in axes}
        if name in weights:
            touched |= _shrink_weight(weights[name], own)
        else:
            _shrink(gm, name, own)
    for (tensor_name, axis), rows in left.items():
        branch = submodule(gm, tensor_name)
        if (
            isinstance(branch, Branch)
            and branch.features is not None
            and isinstance(tensor_name, Node)
        ):
            if axis == branch.axis % tensor_name.meta["val"].dim() and len(rows) == len(
                branch.features
            ):
                branch.features = _renumbered(branch.features, rows)
            if isinstance(branch, RowScale) and branch.own is not None:
                placed = (branch.features > 0).nonzero().flatten()
                branch.own = placed[branch.features[placed].argsort()]
    program.sites = _sites(program.sites, left, set(group.stored), set(weights))
    for node in gm.graph.nodes:
        near = owner(node) in touched
        if near or (divides(gm, node) and owner(node.args[0]) in touched):
            node.meta.pop("val", None)


def _kept(group: Channels, keep: Sequence[int]) -> Tensor:
    kept = torch.zeros(group.count + 1, dtype=torch.bool)  # the last one stands for -1
    wrong = [k for k in keep if not 0 <= k < group.count]
    if wrong or not keep:
        raise PassError(
            f"channels to keep must be at least one of 0..{group.count - 1}, not "
            f"{wrong[:3] or 'none'}."
        )
    kept[list(keep)] = True
    parted = (kept[group.roots] != kept[:-1]).nonzero().flatten().tolist()
    if parted:
        raise PassError(
            f"channel {parted[0]} goes only together with channel {int(group.roots[parted[0]])}."
        )
    return kept


def _shrink(gm: GraphModule, name: str, left: Mapping[int, Tensor]) -> None:
    """A stored tensor without the indices that go, as a tensor of this program's own."""
    old = attribute(gm, name)
    fresh: Tensor = old.detach()
    for axis, rows in left.items():
        fresh = fresh.index_select(axis, rows.nonzero().flatten().to(fresh.device))
    if isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, old.requires_grad)
    set_attribute(gm, name, fresh)


def _shrink_weight(weight: Weight, left: Mapping[int, Tensor]) -> set[str]:
    """The same of a weight in a stored format, whose axes are `[out, in]`; returns its parts."""
    form = weight.format
    for axis, rows in left.items():
        index = rows.nonzero().flatten().to(form.device)
        form = form.slice("in" if axis else "out", index)
    tensors = replace(weight, format=form).tensors()
    put_format(weight.module, weight.name, tensors)
    return set(tensors)


def _renumbered(features: Tensor, rows: Tensor) -> Tensor:
    """The `features` of a branch (see `Branch`) where only some of the fused features are left."""
    place = features.cpu()
    own = torch.zeros(int(place.max()) + 1, dtype=torch.bool)
    own[place[rows]] = True
    own[0] = False
    return (own.cumsum(0) * own)[place[rows]].to(features.device)


# Sizes that operators carry.


def _resize(node: Node, left: Mapping[Ref, Tensor]) -> None:
    """Changes the sizes among a node's arguments."""
    if "val" not in node.meta:  # an earlier cut was here
        return
    if is_op(node, _LISTS):
        _resize_list(node, left)
    elif is_op(node, _NORMS):
        rank = node.meta["val"].dim()
        sizes: Any = named_arguments(node)["normalized_shape"]
        places = range(rank - len(sizes), rank)
        node.update_arg(1, [_count(left, (node, k), s) for k, s in zip(places, sizes, strict=True)])
    elif is_op(node, CONVS) and each(node) and (rows := left.get((node, 1))) is not None:
        _give(node, "groups", int(rows.sum()))
    elif is_op(node, overloads("unflatten")):
        given = named_arguments(node)
        first = int(given["dim"]) % node.args[0].meta["val"].dim()  # pyright: ignore
        new = [_count(left, (node, first + i), s) for i, s in enumerate(given["sizes"])]
        node.update_arg(2, new)
    elif (dense := Unpacked.of(node) or Lookup.of(node)) is not None:
        if (rows := left.get((dense.weight, 1))) is not None:
            dense.resize(int(rows.sum()))
    elif is_op(node, _SPANS):
        _resize_span(node, left)
    elif is_op(node, DIVISIONS):
        _resize_division(node, left)


def _resize_list(node: Node, left: Mapping[Ref, Tensor]) -> None:
    given = named_arguments(node)
    name = next((n for n in ("size", "shape") if isinstance(given.get(n), list | tuple)), None)
    if name is not None:
        sizes: Any = given[name]
        skipped = node.meta["val"].dim() - len(sizes)
        new = [_count(left, (node, skipped + k), s) for k, s in enumerate(sizes)]
        _give(node, name, new)


def _give(node: Node, name: str, value: Any) -> None:
    """Another value for an argument of an operator."""
    names = [a.name for a in node.target._schema.arguments]  # pyright: ignore
    if name in node.kwargs or names.index(name) >= len(node.args):
        node.update_kwarg(name, value)
    else:
        node.update_arg(names.index(name), value)


def _count(left: Mapping[Ref, Tensor], ref: Ref, size: Any) -> Any:
    rows = left.get(ref)
    return size if rows is None or type(size) is not int or size == -1 else int(rows.sum())


def _resize_span(node: Node, left: Mapping[Ref, Tensor]) -> None:
    source: Any = node.args[0]
    if "val" not in source.meta:  # an earlier cut was here
        return
    given = named_arguments(node)
    axis = int(given.get("dim", 0)) % source.meta["val"].dim()
    rows = left.get((owner(source), axis))
    taken = span(node, len(rows)) if rows is not None else None
    if rows is None or taken is None:
        return
    place = rows.cumsum(0) - 1
    index = torch.tensor(list(taken), dtype=torch.long)
    want = place[index[rows[index]]].tolist()
    if not want and not all(is_op(u, EXPANSIONS) for u in node.users):
        raise PassError(f"the cut leaves nothing of {node.name}.")
    begin, end = (want[0], want[-1] + 1) if want else (0, 0)
    step = taken.step
    if want != list(range(begin, end, step)):
        raise PassError(f"what is left of {node.name} is no slice any more.")
    node.target = ATEN.slice.Tensor
    node.args, node.kwargs = (source, axis, begin, end, step), {}


def _resize_division(node: Node, left: Mapping[Ref, Tensor]) -> None:
    source: Any = node.args[0]
    division = pieces(node)
    rows = left.get((owner(source), division[0])) if division is not None else None
    if division is None or rows is None:
        return
    axis, sizes = division
    new = [int(piece.sum()) for piece in rows.split(sizes)]
    if is_op(node, overloads("chunk")) and len(set(new)) == 1:
        return
    node.target = ATEN.split_with_sizes.default
    node.args, node.kwargs = (source, new, axis), {}


# Sites.


def _sites(sites: Sites, left: Mapping[Ref, Tensor], names: set[str], packed: set[str]) -> Sites:
    sites = replace(sites, items=tuple(_site(s, left, names, packed) for s in sites))
    return replace(sites, items=tuple(_heads(s, sites, names) for s in sites))


def _heads(site: Site, sites: Sites, names: set[str]) -> Site:
    """An attention with the heads that its projections have left."""
    if not isinstance(site, AttentionSite):
        return site
    q, k = sites[site.q], sites[site.k]
    if not isinstance(q, LinearSite) or not isinstance(k, LinearSite) or q.weight not in names:
        return site
    heads, kv_heads = (s.out_features // site.head_dim for s in (q, k))
    return replace(site, heads=heads, kv_heads=heads if site.parted else kv_heads)


def _site(site: Site, left: Mapping[Ref, Tensor], names: set[str], packed: set[str]) -> Site:
    def count(axis: int) -> int | None:
        rows = left.get((getattr(site, "weight", ""), axis))
        return None if rows is None else int(rows.sum())

    if isinstance(site, SublayerSite):
        rows = next((r for (node, _), r in left.items()
                     if isinstance(node, Node) and node.name == site.nodes[1]), None)  # fmt: skip
        return site if rows is None else replace(site, width=int(rows.sum()))
    if getattr(site, "weight", None) not in names or isinstance(site, NormSite):
        return site
    if isinstance(site, EmbeddingSite):
        width = count(1)
        return site if width is None else replace(site, width=width)
    if isinstance(site, ConvSite) and not site.transposed:
        out, inner = count(0), count(1)
        groups = site.groups if site.groups == 1 or out is None else out
        channels = (
            groups if site.groups > 1 else inner or site.channels[0],
            out or site.channels[1],
        )
        return replace(site, channels=channels, groups=groups)
    if isinstance(site, ExpertsSite):
        out, inner = map(count, site.axes)
        if site.features is not None and out is not None:
            site = replace(site, features=_features(site, left[site.weight, site.axes[0]]))
            out = len(site.features or ())
        out, inner = out or site.out_features, inner or site.in_features
        return replace(site, out_features=out, in_features=inner)
    if not isinstance(site, LinearSite):
        raise PassError(f"{site.id}: a {site.kind} site cannot be cut yet. Leave it out.")
    turned = site.in_out and site.weight not in packed
    rows, columns = count(1 if turned else 0), count(0 if turned else 1)
    if columns is not None:
        site = replace(site, in_features=columns)
    if rows is None:
        return site
    if site.features is None:
        return replace(site, out_features=rows)
    features = _features(site, left[site.weight, 1 if site.in_out else 0])
    return replace(site, features=features, out_features=len(features))


def _features(site: LinearSite | ExpertsSite, rows: Tensor) -> tuple[int, ...]:
    """The features of a fused weight that a part has left."""
    place = (rows.cumsum(0) - 1).tolist()
    return tuple(place[f] for f in site.features or () if rows[f])
