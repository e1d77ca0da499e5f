"""Capture: any PyTorch model to a `Program`, through `torch.export` in non-strict mode.

The model is only read. Capture runs in training mode with example sizes of at least two (sizes
0 and 1 would be specialised), then canonicalises the graph, gives the train/eval switch back,
and owns its Parameter objects: frozen storage is shared with the model, trainable storage copied.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from ..api import Program
from ..errors import CaptureError
from ..graph.aten import placeholders, set_attribute
from ..graph.modes import follow_modes, restore_modes
from ..graph.module import CapturedModule, state_tensors
from ..graph.outside import outside_modes
from ..graph.placement import buffers_on_meta, computed_buffers, is_hollow
from ..graph.symbols import refresh_sizes, unify
from ..graph.turns import alone
from ..inputs.dynamic import Dynamic, dynamic_axes
from ..inputs.nesting import template_of
from ..inputs.spec import InputSpec, forward_parameters, named_arguments
from ..inputs.tensor_input import TensorInput
from ..measure.independence import Values, kinds_of, relabelled
from ..program.tensors import Tensors
from ..program.trained import chosen, train_only
from ..sites.discover import discover
from ..tracing.canonical import canonicalize
from ..tracing.contraction import plain_products
from ..tracing.guards import Sizes, read_sizes
from ..tracing.reads import aliases_of
from ..tracing.tracing import check_model, export, unwrapped
from ..tracing.training import draws, part_modes, writes
from .cache import Entry, Traced, place
from .left_out import with_optional
from .trial import Trial, must_be_equal, settle


@outside_modes
def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = "auto",
    dtype: torch.dtype | None = None,
    cache: bool | str | Path = False,
) -> Program:
    """Captures `model` as one graph that trains, runs and rewrites.

    Args:
        model: any `nn.Module`; it is not changed in any way.
        args: positional example inputs of its forward (tensors, or constants to bake in).
        kwargs: keyword example inputs.
        dynamic: `"auto"` makes axis 0 of every input, axis 1 of integer and boolean inputs and
            of 3-D float inputs dynamic where the model allows; None fixes all sizes; a mapping
            `{input: {axis: name}}` says exactly which, and what they are called in the spec. Sizes
            of one name are one size. The axis of the samples is called `batch`, or has a name that
            starts so; "auto" tries along which axis samples do not influence one another.
        dtype: captures a copy of the model in this floating-point dtype (default: as it is).
        cache: a directory in which captures are kept (True: the user's own), so that the same
            model, inputs and code are not traced again; see `rewriter/capture/cache.py`.

    Returns:
        A program whose outputs equal the model's bit for bit in training and evaluation mode. An
        input for which `forward` has a default may be left out of calls where a trial shows what
        the model takes for it: one number, or numbers that count.

    Raises:
        CaptureError: the model cannot be captured; the message says why and what to do.
    """
    if isinstance(model, Program | CapturedModule):
        raise CaptureError("this model is captured already: rewrite its Program with peftfx.run.")
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CaptureError(f"capture takes an nn.Module, not {type(model).__name__}.")
    model = unwrapped(model)
    check_model(model)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    spec, tensors = _bind(model, args, kwargs or {}, dtype)
    axes = dynamic_axes(tensors, dynamic)
    aliases = aliases_of(model)
    about = [spec.to_json(), {name: sorted(named.items()) for name, named in axes.items()}]
    entry = Entry(place(cache), model, tensors, about, aliases) if cache is not False else None
    traced = entry.recall() if entry else None
    if entry and traced and not Trial(model, traced.module, traced.spec, tensors).agrees_wholly():
        traced = entry.outdated("the model computes something else than it did")
    if traced is None:
        with alone():
            traced = _trace(model, spec, tensors, axes, aliases)
        if entry:
            entry.store(traced)
    gm = traced.module
    with alone():
        unify(gm, traced.symbols)
        refresh_sizes(gm)
    _own_tensors(gm, aliases, computed_buffers(model) if is_hollow(model) else {})
    if follow_modes(gm, model):
        _modes_must_agree(model, Trial(model, gm, traced.spec, tensors))
    program = Program(
        module=gm,
        spec=traced.spec,
        sites=traced.sites,
        tensors=Tensors(aliases=aliases),
        symbols=traced.symbols,
        extras=_unused(model, gm, aliases),
        state_names=tuple(model.state_dict(keep_vars=True)),
        sample={n: t.detach().clone() for n, t in tensors.items()},
        generation=_generation(model),
        cached=entry.note if entry else "",
        dtype=dtype,
    )
    return _with_choice(program)


def _with_choice(program: Program) -> Program:
    """Lets the program own what the user trains beside frozen weights; its base stays as it is."""
    mine = chosen(program)
    if not mine:
        return program
    fork = program.fork()
    train_only(fork, mine)
    return fork


def _trace(
    model: nn.Module,
    spec: InputSpec,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    aliases: Mapping[str, str],
) -> Traced:
    """Exports a model, brings the graph into canonical form, tries it out and finds its sites."""
    hollow = is_hollow(model)
    given = {n: t.to("meta") for n, t in tensors.items()} if hollow else tensors
    shapes: dict[str, dict[int, Any]] = {n: dict.fromkeys(a, Dim.AUTO) for n, a in axes.items()}
    with buffers_on_meta(model) if hollow else contextlib.nullcontext():
        trace = functools.partial(
            export, model, _at_least_two(given, shapes), spec.arguments, shapes
        )
        exported = trace()
        gm = _canonical(exported, aliases, type(model).__name__)
        sizes = read_sizes(placeholders(gm), exported, axes)
        trial = Trial(model, gm, _sized(spec, sizes, tensors), given)
        if equal := must_be_equal(trial, sizes.symbols):
            sizes = read_sizes(placeholders(gm), exported, axes, equal)
            trial.spec = _sized(spec, sizes, tensors)
        if draws(gm) or writes(gm) or not trial.agrees():
            part_modes(gm, _canonical(trace(training=False), aliases))
        spec = settle(trial.spec, trial)
        _must_agree(model, trial)
    read: set[str] = set()
    sites = discover(gm, aliases, given, read)
    symbols = sizes.symbols
    if all(not name for named in axes.values() for name in named.values()):
        spec, symbols = relabelled(Values(gm, spec, symbols, given, list(sites)))
    else:
        values = Values(gm, spec, symbols, given, list(sites))
        spec = replace(spec, kinds=kinds_of(values))
    spec = with_optional(spec, trial)
    return Traced(gm, spec, sites, symbols, frozenset(read))


def _canonical(
    exported: torch.export.ExportedProgram, aliases: Mapping[str, str], name: str = ""
) -> CapturedModule:
    """A plain module with the exported graph in canonical form and its modes restored."""
    gm = exported.module(check_guards=False)
    canonicalize(gm, aliases)
    plain_products(gm)
    restore_modes(gm)
    gm.graph._tracer_cls = None
    captured = CapturedModule(gm, gm.graph, class_name=name)
    captured._tracer_cls = None  # pyright: ignore[reportArgumentType]
    return captured


def _must_agree(model: nn.Module, trial: Trial) -> None:
    gap, wrong = trial.outcome()
    if wrong:
        raise CaptureError(
            f"{type(model).__name__} writes the tensor {wrong[0]!r} in one mode only, in a way "
            "that the trace cannot follow (an `out=` argument, for example). Write it with "
            "buffer.copy_(value)."
        )
    if not trial.accepts(gap):
        raise CaptureError(
            f"{type(model).__name__} computes something else in evaluation mode than the captured "
            f"graph (off by {gap:.3g} of the largest output). Its forward depends on state that is "
            "not a tensor, or is not deterministic; make it depend on its inputs and buffers only."
        )


def _modes_must_agree(model: nn.Module, trial: Trial) -> None:
    """Some modules are in another mode than the model: does the graph do what they do?"""
    if trial.wrong_updates((None,)) or not trial.accepts(trial.gap_as_they_are()):
        raise CaptureError(
            f"some submodules of {type(model).__name__} are in training and some in evaluation "
            "mode, in a way that the trace cannot follow: a forward reads the mode of another "
            "module than its own. Call model.train() or model.eval() before capturing it."
        )


def _generation(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    names = ("eos_token_id", "pad_token_id")
    return {n: v for n in names if (v := getattr(config, n, None)) is not None}


def _bind(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype | None
) -> tuple[InputSpec, dict[str, Tensor]]:
    """How the model is called, and the example tensors by flat name."""
    names, variadic = forward_parameters(model.forward)
    try:
        given = named_arguments(names, variadic, args, kwargs)
    except TypeError as error:
        raise CaptureError(f"{error}.") from error
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    structure: dict[str, Any] = {}
    for name, item in given.items():
        try:
            template = template_of(name, item, tensors)
        except TypeError as error:
            raise CaptureError(
                f"input {error}; capture takes tensors, numbers, strings, booleans, None, and "
                "lists, tuples and dicts of them. Wrap the model so that its forward takes those."
            ) from error
        if isinstance(item, list | tuple | dict):
            structure[name] = template
        elif not isinstance(item, Tensor) and item is not None:
            constants[name] = item
    if not tensors:
        raise CaptureError("capture needs at least one example tensor: pass args=... or kwargs=...")
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    tensors = {n: t.clone() if t.is_inference() else t for n, t in tensors.items()}
    _check_example(model, tensors)
    inputs = tuple(TensorInput(n, tuple(t.shape), t.dtype) for n, t in tensors.items())
    return InputSpec(inputs, {}, names, constants, structure, variadic), tensors


def _check_example(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    devices = {p.device for p in model.parameters() if not p.is_meta}
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise CaptureError(
                f"the example {name!r} is empty: {tuple(tensor.shape)}. Give one with at least "
                "one element along every axis."
            )
        if len(devices) == 1 and tensor.dim() and tensor.device not in devices:
            (device,) = devices
            raise CaptureError(
                f"the example {name!r} is on {tensor.device}, the model on {device}. Move one of "
                "them; a captured program can be moved later with program.to(device)."
            )


def _at_least_two(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Mapping[int, Any]]
) -> dict[str, Tensor]:
    example: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for axis in shapes[name]:
            if tensor.shape[axis] == 1:
                tensor = tensor.repeat_interleave(2, dim=axis)
        example[name] = tensor
    return example


def _own_tensors(
    gm: GraphModule, aliases: Mapping[str, str], computed: Mapping[str, Tensor]
) -> None:
    own: dict[int, nn.Parameter] = {}
    updated = state_tensors(gm)
    for name, parameter in list(gm.named_parameters(remove_duplicate=False)):
        if name in aliases:
            continue
        data = parameter.detach()
        fresh = nn.Parameter(
            data.clone() if parameter.requires_grad or name in updated else data,
            parameter.requires_grad,
        )
        own[id(parameter)] = fresh
        set_attribute(gm, name, fresh)
    for name, buffer in list(gm.named_buffers()):
        buffer = computed.get(name, buffer)
        set_attribute(gm, name, buffer.detach().clone() if name in updated else buffer.detach())


def _unused(
    model: nn.Module, captured: GraphModule, aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    captured_names = {n for n, _ in captured.named_parameters()} | {
        n for n, _ in captured.named_buffers()
    }
    return {
        name: tensor.detach().clone() if tensor.requires_grad else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if aliases.get(name, name) not in captured_names
    }


def _sized(spec: InputSpec, sizes: Sizes, tensors: Mapping[str, Tensor]) -> InputSpec:
    inputs = (
        TensorInput(name, shape, tensors[name].dtype, _fill(tensors[name]))
        for name, shape in sizes.shapes.items()
    )
    return replace(
        spec,
        inputs=tuple(inputs),
        ranges=sizes.ranges,
        relations=tuple(sizes.relations),
        reasons=sizes.reasons,
    )


def _fill(tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return True
    if tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return 0
    return int(tensor.max())
