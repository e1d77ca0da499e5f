"""The shape of the weight behind a site, read off its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..branches.convolutions import ConvolutionShape, TransposedShape
from ..branches.shapes import EmbeddingShape, ExpertsShape, LinearShape, Shape
from ..errors import PassError
from ..graph.aten import (
    CASTS,
    EMBEDDING,
    LINEAR,
    TRANSPOSED_CONVS,
    is_op,
    named_arguments,
    overloads,
    parameter_of,
    value,
)
from ..graph.weighted_call import CONVOLUTIONS, INDEX, WeightedCall, data_index, is_grouped
from ..program.readers import turned
from ..program.sites import ConvSite, ExpertsSite, LinearSite, WeightSite


def shape_of(site: WeightSite, call: Node | None) -> Shape:
    """How a site's calls multiply by its weight; `call` is one of them.

    Raises:
        PassError: no branch can stand beside the call, see `call_obstacle`.
    """
    if isinstance(site, LinearSite):
        return LinearShape(site.in_out)
    reason = "its call is gone" if call is None else call_obstacle(site, [call])
    if call is None or reason:
        raise PassError(f"{site.id}: {reason}.")
    given = named_arguments(call)
    if isinstance(site, ConvSite):
        count = len(site.kernel)
        stride, dilation = (_each(given.get(n, 1), count) for n in ("stride", "dilation"))
        padding: Any = given.get("padding", 0)
        padding = padding if isinstance(padding, str) else _each(padding, count)
        options = (site.kernel, stride, padding, dilation, site.groups)
        if not site.transposed:
            return ConvolutionShape(*options)
        return TransposedShape(*options, _each(given.get("output_padding", 0), count))
    if isinstance(site, ExpertsSite):
        grouped = is_grouped(call)
        own = call.target if grouped and is_op(call, overloads("_grouped_mm")) else None
        operator = own if callable(own) else None
        return ExpertsShape(site.experts, site.in_out, grouped, operator, site.place)
    known = value(call)
    dtype = given["dtype"] if known is None else known.dtype
    padding = given.get("padding_idx", None if is_op(call, INDEX) else -1)
    id_ = padding if isinstance(padding, int) and padding >= 0 else None
    return EmbeddingShape(dtype, id_, wraps=padding is None)


def _each(number: Any, count: int) -> tuple[int, ...]:
    """One number an axis."""
    numbers: tuple[int, ...] = tuple(number) if isinstance(number, Sequence) else (number,)
    return numbers * count if len(numbers) == 1 else numbers


def call_obstacle(site: WeightSite, calls: Sequence[Node]) -> str:
    """Why no branch can stand beside a site's calls; empty if one can."""
    if site.obstacle or isinstance(site, LinearSite):
        return site.obstacle
    for call in calls:
        if not reads_as_stored(site, call):
            return f"{call.name} does not multiply by {site.weight} as it is stored"
    if isinstance(site, ConvSite) and len({_options(call) for call in calls}) > 1:
        return f"its calls {', '.join(c.name for c in calls)} have different strides or paddings"
    return ""


def _options(call: Node) -> str:
    given: Mapping[str, Any] = named_arguments(call)
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    return str([given.get(n) for n in names])


def reads_as_stored(site: WeightSite, call: Node) -> bool:
    """Whether a call reads the site's weight in the way that the site says."""
    parts = WeightedCall.of(call)
    if parts is not None and parts.stored is not None:
        return parts.stored.weight == site.weight
    known = None if parts is None else parameter_of(parts.weight, depth=64)
    if parts is None or known is None or known[0] != site.weight:
        return False
    if isinstance(site, LinearSite):
        stored_turned = site.in_out if is_op(call, LINEAR) else site.in_out == site.left
        return turned(known[1]) is stored_turned
    if isinstance(site, ExpertsSite):
        if bool(data_index(call)) != site.left or (is_grouped(call) and not parts.operands):
            return False
        return turned(known[1], site.place) is (site.in_out == site.left)
    if not all(is_op(step, CASTS) for step in known[1]):
        return False
    if isinstance(site, ConvSite):
        transposed = is_op(call, TRANSPOSED_CONVS)
        return is_op(call, CONVOLUTIONS) and transposed is site.transposed
    ids: Any = value(parts.x)
    is_lookup = is_op(call, INDEX | {EMBEDDING}) and isinstance(ids, Tensor)
    return is_lookup and ids.dtype in (torch.int64, torch.int32)
