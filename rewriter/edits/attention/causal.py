"""The causal fast path: an explicit mask that is provably causal gives way to `is_causal`.

Tracing keeps the mask explicit, which rules out flash attention and computes `[tokens, tokens]`
values. Without padding most decoders' masks are just causal; that is evaluated here up to a length,
which becomes the longest that the program accepts, and the padding mask is no input any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ...errors import MetaTensorError, PassError
from ...graph.aten import (
    ATEN,
    SIZES,
    ancestors,
    attribute,
    erase_dead,
    is_op,
    overloads,
    placeholders,
    shape,
    submodule,
    users,
)  # fmt: skip
from ...graph.modes import Attention
from ...graph.module import device_of
from ...program.site_table import Sites
from ...program.sites import AttentionSite
from ...program.state import State
from ..calls.attach import Attaching
from ..calls.samples import sample_axis
from ..calls.signature import forget_input

_RESHAPES = overloads("reshape", "view", "_unsafe_view")
_SHORT = (1, 2, 3, 7, 16, 33)


def use_causal(edit: Attaching, length: int) -> None:
    """Replaces every mask that is causal without padding; reports the other attentions.

    Raises:
        PassError: a padding mask is also read elsewhere, so that it cannot be left out.
    """
    gm = edit.graph_module
    sites = {name: s for s in edit.program.sites.of("attention") for name in s.nodes}
    verdicts: dict[Node, str] = {}
    padding: set[Node] = set()
    changed: dict[str, AttentionSite] = {}
    for node in list(gm.graph.nodes):
        site = sites.get(node.name)
        if not isinstance(submodule(gm, node), Attention) or not isinstance(site, AttentionSite):
            continue
        mask = _mask(node)
        if mask is None:
            edit.skip(site, "it has no mask")
            continue
        if mask not in verdicts:
            verdicts[mask] = _difference(edit.program, mask, length)
        if verdicts[mask]:
            edit.skip(site, verdicts[mask])
            continue
        padding |= {n for n in _values(mask) if n.op == "placeholder"}
        grouped = _go_causal(node)
        edit.edited.append(site.id)
        changed[site.id] = replace(site, causal=True, repeated=site.repeated and not grouped)
    if not changed:
        raise PassError(
            "no attention has a mask that is causal without padding: "
            f"{'; '.join(sorted(set(verdicts.values()))) or 'there is none to replace'}."
        )
    erase_dead(gm)
    dropped = {str(p.target): p for p in padding}
    for placeholder in dropped.values():
        _drop(edit.program, placeholder)
    edit.program = _narrowed(edit.program, set(dropped), changed, length)


def _mask(node: Node) -> Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("mask")
    return mask if isinstance(mask, Node) else None


def _values(mask: Node) -> list[Node]:
    """What the mask's values (not only its sizes) depend on, in graph order."""
    above = set(ancestors(mask, block=lambda n: is_op(n, SIZES)))
    return [n for n in mask.graph.nodes if n in above]


def _difference(program: State, mask: Node, length: int) -> str:
    """How a mask differs from a causal one without padding; '' if it does not."""
    batches = sample_axis(program).names
    fixed = (shape(mask) or (None,))[-1]
    lengths = (*(t for t in _SHORT if t < length), length)
    for tokens in (fixed,) if isinstance(fixed, int) else lengths:
        sizes = {n: 2 if n in batches else tokens for n in program.spec.sizes}
        ranges = {n: program.spec.ranges.get(n, (1, None)) for n in sizes}
        if any(h is not None and sizes[n] > h for n, (_, h) in ranges.items()):
            continue
        masks = _evaluate(program, mask, program.spec.example(None, **sizes))
        if masks.is_meta:
            raise MetaTensorError("masks cannot be compared on meta. Move the program first.")
        if tuple(masks.shape[-2:]) != (tokens, tokens):
            return f"its mask is {tuple(masks.shape[-2:])} at {tokens} tokens"
        kept = masks if masks.dtype == torch.bool else masks == 0
        hidden = not masks.is_floating_point() or bool(
            (masks[~kept] <= torch.finfo(masks.dtype).min / 2).all()
        )
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=masks.device).tril()
        if not hidden or not bool((kept == causal).all()):
            return f"its mask is not causal at {tokens} tokens"
    return ""


def _evaluate(program: State, mask: Node, inputs: Mapping[str, Tensor]) -> Tensor:
    gm = program.module
    needed = set(ancestors(mask))
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node not in needed:
                continue
            loaded: Any = map_arg((node.args, node.kwargs), lambda n: values[n])
            args, kwargs = loaded
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)].to(device_of(gm))
            elif node.op == "get_attr":
                values[node] = attribute(gm, str(node.target))
            elif node.op == "call_module":
                values[node] = gm.get_submodule(str(node.target))(*args, **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return values[mask]


def _go_causal(node: Node) -> bool:
    """Rewrites one attention; True if its keys and values need no repeating any more."""
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("mask", "is_causal")}
    query, key, value = node.args[:3]
    own = unrepeated(key), unrepeated(value)
    grouped = own[0] is not None and own[1] is not None and not kwargs.get("enable_gqa")
    if grouped:
        key, value = own
        kwargs["enable_gqa"] = True
    node.args = (query, key, value, None, True)
    node.kwargs = kwargs
    return grouped


def unrepeated(node: Any) -> Node | None:
    """`x` of `x[:, :, None].expand(...).reshape(...)`, which repeats heads in groups."""
    if not is_op(node, _RESHAPES):
        return None
    expand = node.args[0]
    inner = expand.args[0] if is_op(expand, overloads("expand")) else None
    if not is_op(inner, ATEN.unsqueeze.default) or inner.args[1] != 2:  # pyright: ignore[reportOptionalMemberAccess]
        return None
    before, after = shape(expand), shape(node)
    if before is None or after is None or len(before) != 5 or len(after) != 4:
        return None
    return inner.args[0] if before[1] * before[2] == after[1] else None  # pyright: ignore


def _drop(program: State, placeholder: Node) -> None:
    """Removes an input of which only sizes are read any more."""
    gm, name = program.module, str(placeholder.target)
    if users(placeholder):
        raise PassError(
            f"the padding mask {name!r} is also read by {users(placeholder)[0].name}, so that it "
            "cannot be left out. Keep the explicit masks for this model."
        )
    shapes = {i.name: i.shape for i in program.spec.inputs}
    others = {n: p for n, p in placeholders(gm).items() if n != name}
    for query in list(placeholder.users):
        label = shapes[name][query.args[1]]  # pyright: ignore
        other_axes = [(p, shapes[n].index(label)) for n, p in others.items() if label in shapes[n]]
        if not other_axes:
            raise PassError(f"only the padding mask {name!r} says what {label} is.")
        query.args = other_axes[0]
    gm.graph.erase_node(placeholder)
    forget_input(gm, name)


def _narrowed(
    program: State, dropped: set[str], changed: Mapping[str, AttentionSite], length: int
) -> State:
    spec = program.spec
    sizes = {s for i in spec.inputs if i.name in dropped for s in i.shape} or set(spec.sizes)
    tokens = sizes - sample_axis(program).names
    ranges, reasons = dict(spec.ranges), dict(spec.reasons)
    for size in tokens & set(ranges):
        low, high = ranges[str(size)]
        ranges[str(size)] = low, length if high is None else min(high, length)
        reasons[str(size)] = "its masks were proven causal up to here: causal{length=...}"
    for name in dropped:
        reasons[name] = "the causal pass leaves padding out"
    inputs = tuple(i for i in spec.inputs if i.name not in dropped)
    return replace(
        program,
        spec=replace(spec, inputs=inputs, ranges=ranges, reasons=reasons),
        sample={n: t for n, t in program.sample.items() if n not in dropped},
        sites=Sites(tuple(changed.get(s.id, s) for s in program.sites)),
    )
