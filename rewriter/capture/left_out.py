"""Inputs that a call may leave out: what the model itself takes in their place, found by trial.

Where `forward` has a default for an input of the example, the model is called without it, and the
graph with one number, or with numbers that count, in its place. What gives the same, for the
example and for other values and sizes of all other inputs, is what a call gets that leaves the
input out. Defaults that are computed from other inputs (positions that skip padding) differ for
some of those values, and stay inputs that every call gives, with the reason in the spec.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.aten import inputs as operands
from ..graph.aten import parameter_of, placeholders
from ..graph.weighted_call import WeightedCall, looked_up
from ..inputs.nesting import leaves
from ..inputs.probes import fit
from ..inputs.spec import InputSpec
from ..inputs.tensor_input import Absent, TensorInput
from ..measure.compare import relative
from .trial import Trial


def with_optional(spec: InputSpec, trial: Trial) -> InputSpec:
    """The spec in which inputs are optional that the model is shown to make as the graph gets them.

    Nothing is where no trial is possible (on the meta device).
    """
    names = _defaulted(trial.model, spec) if trial.possible else set[str]()
    if not names:
        return spec
    trial.spec = spec
    examples = _examples(trial, spec)
    found = {i.name: _shown(trial, i, examples) for i in spec.inputs if i.name in names}
    shown = {n: a for n, a in found.items() if isinstance(a, Absent)}
    shown = {n: a for n, a in shown.items() if _sized_by_others(spec, n, shown.keys())}
    if len(shown) > 1 and not all(_agrees(trial, given, shown) for given in examples):
        shown = {}
    reasons = {n: why for n, why in found.items() if isinstance(why, str)}
    inputs = tuple(
        replace(i, optional=True, absent=shown[i.name])
        if i.name in shown
        else replace(i, needed=reasons.get(i.name, ""))
        for i in spec.inputs
    )
    return replace(spec, inputs=inputs)


def _defaulted(model: nn.Module, spec: InputSpec) -> set[str]:
    """Tensor inputs that the model's `forward` need not be given."""
    inside = {n for template in spec.structure.values() for n in leaves(template)}
    parameters = inspect.signature(model.forward).parameters
    return {
        n
        for n in spec.names
        if n not in inside
        and n in parameters
        and parameters[n].default is not inspect.Parameter.empty
    }


def _shown(trial: Trial, item: TensorInput, examples: list[dict[str, Tensor]]) -> Absent | str:
    """What the model takes for an input that it is not given, or why that is not known; an empty
    text where it cannot do without."""
    left = _candidates(item, trial.sample[item.name])
    for given in examples:
        wanted = trial.of_model({n: t for n, t in given.items() if n != item.name})
        if wanted is None:
            return ""
        still: list[Absent] = []
        for absent in left:
            got = trial.of_graph(_filled(given, {item.name: absent}))
            if got is not None and len(got[0]) != len(wanted[0]):
                return "without it, the model returns something else"
            if got is not None and trial.accepts(relative(wanted[0], got[0])):
                still.append(absent)
        left = still
    if len(left) == 1:
        return left[0]
    return "what the model takes without it is " + (
        "not known: nothing depends on it yet" if left else "neither one number nor a count"
    )


def _agrees(trial: Trial, given: Mapping[str, Tensor], shown: Mapping[str, Absent]) -> bool:
    """Whether that also holds with all of them left out."""
    wanted = trial.of_model({n: t for n, t in given.items() if n not in shown})
    got = trial.of_graph(_filled(given, shown))
    return wanted is not None and got is not None and trial.accepts(relative(wanted[0], got[0]))


def _filled(given: Mapping[str, Tensor], shown: Mapping[str, Absent]) -> dict[str, Tensor]:
    made = {n: a.tensor(given[n].shape, given[n].dtype, given[n].device) for n, a in shown.items()}
    return {**given, **made}


def _candidates(item: TensorInput, example: Tensor) -> list[Absent]:
    """Numbers that lie within the example's, since others may be no index of a table."""
    if item.dtype == torch.bool:
        return [Absent(False), Absent(True)]
    if item.dtype.is_floating_point:
        return [Absent(0.0), Absent(1.0)]
    low, high = int(example.min()), int(example.max())
    numbers = dict.fromkeys((low, *(n for n in (0, 1) if low <= n <= high)))
    axes = [a for a, size in enumerate(example.shape) if size > 1 and low + size - 1 <= high]
    return [*map(Absent, numbers), *(Absent(low, axis) for axis in axes)]


def _sized_by_others(spec: InputSpec, name: str, optional: Any) -> bool:
    """Whether inputs that every call gives have all the dynamic sizes of an input."""
    known = {s for i in spec.inputs if i.name not in optional for s in i.shape}
    (shape,) = (i.shape for i in spec.inputs if i.name == name)
    return all(isinstance(size, int) or size in known for size in shape)


def _examples(trial: Trial, spec: InputSpec) -> list[dict[str, Tensor]]:
    """The captured example, and other values in smaller sizes."""
    example = dict(trial.sample)
    sizes = spec.sizes_of(example)
    smaller = fit(spec, {n: max(min(size, 2), size - 1) for n, size in sizes.items()})
    cut = spec.resize(example, **(smaller or sizes))
    pads = set(_pads(trial.model))
    return [example, {n: _other(t, _below(trial.gm, n, pads)) for n, t in cut.items()}]


def _pads(model: nn.Module) -> Iterator[int]:
    """Ids that stand for padding, as tables and configurations say."""
    for module in model.modules():
        known = getattr(module, "padding_idx", None), getattr(module, "pad_token_id", None)
        yield from (n for n in known if isinstance(n, int) and n >= 0)
    configured = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(configured, int) and configured >= 0:
        yield configured


def _below(gm: GraphModule, name: str, ids: set[int]) -> list[int]:
    """Those of `ids` that are rows of every table in which an input is looked up."""
    node = placeholders(gm).get(name)
    if node is None:
        return []
    rows = [r for call in gm.graph.nodes if (r := _rows(call, node)) is not None]
    return sorted(i for i in ids if rows and i < min(rows))


def _rows(call: Node, read: Node) -> int | None:
    """How many rows a table has that `call` looks `read` up in, as it is or reshaped."""
    ids, weighted = looked_up(call), WeightedCall.of(call)
    while ids is not None and ids is not read and len(operands(ids)) == 1:
        (ids,) = operands(ids)
    if ids is not read or weighted is None or parameter_of(weighted.weight) is None:
        return None
    return int(weighted.weight.meta["val"].shape[0])


def _other(tensor: Tensor, pads: list[int]) -> Tensor:
    """Other values of an input: other ids, padding among them; masks with holes; zeros."""
    if tensor.dim() == 0:
        return tensor
    moved = tensor.clone()
    first, last = moved[0].view(-1), moved[-1].view(-1)
    if tensor.dtype.is_floating_point:
        last[-1] = 0
        return moved
    if tensor.dtype == torch.bool or int(tensor.max()) <= 1:
        first[:1], last[-1:] = 0, 0
        return moved
    if int(tensor.min()) < 0:  # labels, which mean nothing below zero
        return moved
    ids = torch.arange(moved.numel(), device=moved.device) * 7 % (int(tensor.max()) + 1)
    moved.copy_(ids.view_as(moved))
    for place, pad in enumerate(pads[: first.numel() // 2]):
        first[place], last[-1 - place] = pad, pad
    return moved
