"""Edits for tokens before the input, and for moved positions.

The graph itself keeps its sizes: inputs are padded in front of it and outputs are stripped behind
it, so masks, causality and positions follow by themselves, and only the inputs get shorter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from ...branches.branch import Branch
from ...errors import PassError
from ...graph.aten import (
    SOFTMAX,
    VIEWS,
    ancestors,
    inputs,
    is_float,
    is_op,
    output_node,
    overloads,
    placeholders,
    reaches,
    shape,
    strip,
    submodule,
    users,
    value,
)  # fmt: skip
from ...graph.modes import Attention
from ...graph.symbols import fresh_size
from ...graph.weighted_call import looked_up
from ...inputs.spec import InputSpec
from ...program.sites import AttentionSite, EmbeddingSite, Site
from ...program.state import State
from ...sites.landmarks import ids_of
from ..attention.keyvalue import add_call
from ..calls.call import branch_call, latest, move_before
from ..calls.samples import ShownAxes
from ..linear.compose import composed_value
from .packed_rows import packed_by
from .pads import PadPositions, PadTokens, StripTokens, longer_prompts
from .places import moved_places
from .prompt_reads import first_of, own_reads, require_before, stripped

Halves = Literal["encoder", "decoder", "both"]
"""Of an encoder-decoder, as an option."""
_LOSSES = overloads("cross_entropy_loss", "nll_loss", "nll_loss_nd")
_WAVES = overloads("cos", "sin")
_EQUALITIES = overloads("eq", "ne")


def shorter(program: State, label: str, length: int) -> InputSpec:
    """The input spec with `length` less of the size named `label`, which the graph adds itself."""
    spec = program.spec
    low, high = spec.ranges[label]
    if high is not None and high <= length:
        raise PassError(
            f"a prompt of {length} tokens leaves no position for the input: {label} is at most "
            f"{high}. Make it shorter."
        )
    ranges = {**spec.ranges, label: (max(1, low - length), high and high - length)}

    def longer(text: str) -> str:
        return re.sub(rf"\b{label}\b", f"({label} + {length})", text)

    relations = tuple(longer(r) for r in spec.relations)
    reasons = {longer(k) if k in spec.relations else k: v for k, v in spec.reasons.items()}
    return replace(spec, ranges=ranges, relations=relations, reasons=reasons)


def meaning_of(program: State, source: Node) -> str | None:
    """What an input other than the token ids is, from where its values go: `mask`, `labels`,
    `positions` or `types`; None if they go nowhere telling."""
    gm = program.module

    def stop(node: Node) -> bool:
        return (
            is_op(node, _LOSSES | SOFTMAX | _WAVES)
            or looked_up(node) is not None
            or isinstance(submodule(gm, node), Attention)
        )  # fmt: skip

    def block(node: Node) -> bool:  # a gate that reads the mask is on the way to everything
        return isinstance(submodule(gm, node), Branch)

    roles = {s.nodes[0]: s.role for s in program.sites if s.kind == "embedding"}
    for node in reaches(source, stop, block):
        if is_op(node, _LOSSES):
            return "labels"
        if looked_up(node) is not None:
            return "positions" if roles.get(node.name) == "position" else "types"
        return "positions" if is_op(node, _WAVES) else "mask"
    return None


def entrances(program: State, sites: Sequence[Site], halves: Halves = "encoder") -> list[Site]:
    """Of the token embeddings of an encoder-decoder, those in front of the given `halves`:
    `encoder` (which cross-attention looks at), `decoder`, or `both`; of other models all.

    Raises:
        PassError: the model has no such half.
    """
    nodes = {n.name: n for n in program.module.graph.nodes}
    cores = [s for s in program.sites if isinstance(s, AttentionSite) and s.cross]
    keys = [nodes[name] for core in cores for name in program.sites[core.k].nodes]
    attended = {n.name for key in keys for n in ancestors(key)}
    encoder = [s for s in sites if attended.intersection(s.nodes)]
    decoder = [s for s in sites if s not in encoder]
    if halves != "encoder" and not (encoder and decoder):
        raise PassError(
            f"halves={halves}: the model has no token embeddings of both an encoder and a decoder. "
            "Leave halves out, or choose embeddings with where=."
        )
    chosen = {"encoder": encoder, "decoder": decoder, "both": [*encoder, *decoder]}[halves]
    return chosen or list(sites)


def separate(program: State, sites: Sequence[Site]) -> None:
    """Makes sure that no two of the embeddings are looked up by the same ids.

    Raises:
        PassError: two are; a prompt stands in front of one of them, and choosing is the user's.
    """
    nodes = {n.name: n for n in program.module.graph.nodes}
    first: dict[object, Site] = {}
    for site in sites:
        ids: Any = _looked_up(nodes[site.nodes[0]])
        other = first.setdefault(ids, site)
        if other is not site:
            raise PassError(
                f"{other.id} and {site.id} are looked up by the same ids, and a prompt stands in "
                "front of one table only (the others give the row of one fixed id there). Choose "
                f"it with where=, for example where={other.module}."
            )


def beside(program: State, site: EmbeddingSite) -> list[tuple[Site, int]]:
    """The other tables that are looked up by an embedding's ids, with the id whose row they give
    at the positions of a prompt in front of it."""
    nodes = {n.name: n for n in program.module.graph.nodes}
    ids = _looked_up(nodes[site.nodes[0]])
    others = [s for s in program.sites if s.kind == "embedding" and s.id != site.id]
    return [(s, _neutral(ids)) for s in others if _looked_up(nodes[s.nodes[0]]) is ids]


def _looked_up(lookup: Node) -> Node:
    """What a lookup takes its ids from."""
    index: Any = lookup.args[1]
    return ids_of(index[0] if isinstance(index, list | tuple) else index)


def prepend_tokens(
    program: State,
    axes: ShownAxes,
    site: EmbeddingSite,
    embedding: Node,
    path: str,
    reads: Mapping[str, Node],
    start: Node | None = None,
) -> State:
    """See `Editor.prepend_tokens`; returns the program with its narrower input range.

    Args:
        start: the value of the tokens that the rows overwrite; the embedding by default.
    """
    gm = program.module
    attachment = next(a for a in program.attachments if a.path == path)
    branch: Any = gm.get_submodule(path)
    length: int = branch.length
    ids, symbol = _token_ids(program, axes, site, embedding)
    _require_own_size(program, axes, ids, symbol)
    branch.tokens_first = str(value(embedding).shape[0]) == symbol
    if packed := packed_by(program, axes.named):
        raise PassError(
            f"{packed}, so a prompt in front of it would be that of one sample alone. Choose "
            "prefix_tuning, which every sample sees."
        )
    require_before(program, attachment, reads, embedding)
    own = own_reads(program, attachment, reads)
    outputs = _token_outputs(gm, symbol)
    moves = moved_places(gm, embedding, ids, symbol, length)
    total, size = longer_prompts(gm, symbol, branch)
    size = size or fresh_size(gm, value(ids).fake_mode, program.symbols[symbol])
    label = program.symbols.get(str(size), program.symbols[symbol])
    for node, arguments in moves.items() if branch.place != "stream" else ():
        node.args = arguments
    for source in placeholders(gm).values():
        if symbol not in [str(d) for d in shape(source) or ()]:
            continue
        pad = _pad(program, site, source, ids, symbol, length)
        with gm.graph.inserting_after(source):
            padded = add_call(gm, "pad_tokens", pad, (source,))
        source.replace_all_uses_with(
            padded, delete_user_cb=lambda u, p=padded: u is not p and u not in own
        )
        padded.meta["val"] = value(source)
        source.meta["val"] = _resized(source, symbol, size)

    def strip_prompt(node: Node, axes: tuple[int, ...]) -> Node:
        call = add_call(gm, "strip_tokens", StripTokens(total, axes), (node,))
        call.meta["val"] = _resized(node, symbol, size)
        return call

    def strip_behind(node: Node, axes: tuple[int, ...]) -> Node:
        with gm.graph.inserting_after(node):
            return strip_prompt(node, axes)

    reads = stripped(program, attachment, reads, own, symbol, strip_behind)
    # What branches add to the table is no part of the prompt.
    rows = start or composed_value(embedding)
    with gm.graph.inserting_after(latest(gm, {"": rows, **reads})):
        prompt = branch_call(gm, path, (rows,), reads)
    prompt.meta["val"] = value(embedding)
    rows.replace_all_uses_with(prompt, delete_user_cb=lambda u: u is not prompt and u not in own)
    if prompt.users:
        move_before(prompt, first_of(gm, prompt.users))
    end = output_node(gm)
    for leaf, token_axes in outputs.items():
        with gm.graph.inserting_before(end):
            end.replace_input_with(leaf, strip_prompt(leaf, token_axes))
    program.spec = shorter(program, label, length)
    program.symbols = {**program.symbols, symbol: f"{label} + {total}", str(size): label}
    return program


def _pad(
    program: State, site: EmbeddingSite, source: Node, ids: Node, symbol: str, length: int
) -> PadTokens | PadPositions:
    """What continues an input of one number for each token in front of them.

    Raises:
        PassError: it has more, or nothing tells what it is.
    """
    dims = [str(d) for d in shape(source) or ()]
    if len(dims) != 2:
        raise PassError(
            f"input {source.name!r} is [{', '.join(dims)}], not one number for each token, so "
            "nothing can be put in front of the tokens. Capture without it, or choose "
            "prefix_tuning."
        )
    meaning = "ids" if source is ids else meaning_of(program, source)
    if meaning is None:
        raise PassError(
            f"input {source.name!r} has a token axis, but where its values go does not show "
            "how a prompt continues it. Capture without it, or prepend at another embedding "
            f"than {site.id}."
        )
    axis = dims.index(symbol)
    if meaning == "positions":
        return PadPositions(length, axis)
    fills = {"ids": _neutral(ids), "types": 0, "mask": 1, "labels": -100}
    return PadTokens(length, fills[meaning], axis)


def _token_ids(
    program: State, axes: ShownAxes, site: EmbeddingSite, embedding: Node
) -> tuple[Node, str]:
    """The input that an embedding looks up, `[batch, sequence]` or `[sequence, batch]`, behind
    the prompts that are there, and the size of its tokens."""
    known = looked_up(embedding)
    ids: Any = None if known is None else strip(known, VIEWS)
    size = shape(ids)
    source = ids
    if isinstance(ids, Node) and isinstance(submodule(program.module, ids), PadTokens):
        (source,) = inputs(ids)
    if not isinstance(source, Node) or source.op != "placeholder" or size is None or len(size) != 2:
        raise PassError(
            f"{site.id} is not looked up by an input of token ids [batch, sequence], so no tokens "
            "can be put in front. Choose another embedding with where=, or prefix_tuning."
        )
    axis = 0 if axes.named.place(ids, "batch") == 1 else 1
    symbol = str(size[axis])
    if symbol not in program.symbols:
        why = program.spec.reasons.get(f"{source.target}.{axis}", "it was captured so")
        raise PassError(
            f"the graph is made for exactly {symbol} tokens of {source.target!r} ({why}), so none "
            "can be put in front. Capture with a dynamic number of tokens, or choose another "
            "method, such as lora."
        )
    laid = [str(s) for s in shape(embedding) or ()]
    if len(laid) != 3 or symbol not in laid[:2]:
        raise PassError(
            f"what {site.id} gives is [{', '.join(laid)}], not [batch, sequence, width] or "
            "[sequence, batch, width], so no tokens can be put in front. Choose prefix_tuning."
        )
    return ids, symbol


def _require_own_size(program: State, axes: ShownAxes, ids: Node, symbol: str) -> None:
    """Raises PassError where the number of tokens is also that of something else: samples, or the
    tokens of another stream, which no prompt makes longer."""
    label, sizes = program.symbols[symbol], [str(s) for s in shape(ids) or ()]
    say = "Capture with names of their own for both: dynamic={input: {axis: name}}."
    if sizes.count(symbol) > 1:
        raise PassError(f"{label} is the number of samples of {ids.target!r}, too. {say}")
    tokens = axes.line(ids, sizes.index(symbol))
    for source in placeholders(program.module).values():
        if source is ids or symbol not in [str(s) for s in shape(source) or ()]:
            continue
        own = is_float(source) or meaning_of(program, source) == "types"
        if own and tokens.reaches(source) is not True:
            raise PassError(
                f"{label} is the number of tokens of {ids.target!r} and of {source.target!r}, "
                f"which are two streams, and a prompt stands in front of one. {say}"
            )


def _resized(node: Node, symbol: str, size: Any) -> Tensor:
    """A fake value like a node's, with another size where it had `symbol`."""
    val: Any = value(node)
    with val.fake_mode:
        return val.new_empty([size if str(d) == symbol else d for d in val.shape])


def _neutral(ids: Node) -> int:
    """A token id that the model compares with nothing (padding, image places)."""
    special: set[object] = set()
    stack = [ids]
    while stack:
        for user in users(stack.pop()):
            if is_op(user, _EQUALITIES):
                special.add(user.args[1])
            elif is_op(user, VIEWS):
                stack.append(user)
    return next(i for i in range(len(special) + 1) if i not in special)


def _token_outputs(gm: GraphModule, symbol: str) -> dict[Node, tuple[int, ...]]:
    outputs: dict[Node, tuple[int, ...]] = {}
    for leaf in output_node(gm).all_input_nodes:
        sizes = [str(d) for d in shape(leaf) or ()]
        if merged := [d for d in sizes if d != symbol and re.search(rf"\b{symbol}\b", d)]:
            raise PassError(
                f"the output {leaf.name} has an axis of {merged[0]} values, from which no tokens "
                "can be stripped. Wrap the model so that it returns tokens on an axis of their own."
            )
        axes = tuple(i for i, d in enumerate(sizes) if d == symbol)
        if axes:
            outputs[leaf] = axes
    return outputs
