"""Capture: any PyTorch model to a `Program`, through `torch.export` in non-strict mode.

The model is only read. Capture runs in training mode with example sizes of at least two (sizes
0 and 1 would be specialised), then canonicalises the graph, gives the train/eval switch back,
and owns its Parameter objects: frozen storage is shared with the model, trainable storage copied.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from .aten import placeholders, set_attribute, shape
from .cache import Entry, Traced, place
from .canonical import canonicalize
from .discover import discover
from .errors import CaptureError
from .modes import restore_modes
from .placement import buffers_on_meta, computed_buffers, is_hollow
from .program import Program, state_buffers
from .propagate import quiet
from .spec import InputSpec, TensorInput, forward_parameters

Dynamic = Literal["auto"] | Mapping[str, Mapping[int, str]] | None

_REMEDIES = (
    ("data-dependent", "The forward branches on tensor values: use torch.where or torch.cond."),
    ("GuardOnDataDependent", "Control flow depends on values: use torch.where or torch.cond."),
    ("Could not guard", "Control flow depends on tensor values: use torch.where or torch.cond."),
    ("aliases", "Return fresh tensors instead of views of the inputs."),
    ("Unsupported", "Rewrite the named call with plain torch operations."),
)


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = "auto",
    cache: bool | str | Path = False,
) -> Program:
    """Captures `model` as one graph that trains, runs and rewrites.

    Args:
        model: any `nn.Module`; it is not changed in any way.
        args: positional example inputs of its forward (tensors, or constants to bake in).
        kwargs: keyword example inputs.
        dynamic: `"auto"` makes axis 0 of every input, axis 1 of integer and boolean inputs and
            of 3-D float inputs dynamic where the model allows; None fixes all sizes; a mapping
            `{input: {axis: name}}` says exactly which.
        cache: a directory in which captures are kept (True: the user's own), so that the same
            model, inputs and code are not traced again; see `rewriter/cache.py`.

    Returns:
        A program whose outputs equal the model's bit for bit in training and evaluation mode.

    Raises:
        CaptureError: the model cannot be captured; the message says why and what to do.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CaptureError(f"capture takes an nn.Module, not {type(model).__name__}.")
    if isinstance(model, GraphModule) and hasattr(model, "_peftfx"):
        raise CaptureError("this module is captured already; pass its Program instead.")
    names, tensors, constants = _bind(model, args, kwargs or {})
    shapes = _dynamic_shapes(tensors, dynamic)
    aliases = _aliases(model)
    about = [names, constants, {n: sorted(axes) for n, axes in shapes.items()}]
    entry = Entry(place(cache), model, tensors, about, aliases) if cache is not False else None
    traced = entry.recall() if entry else None
    if traced is None:
        traced = _trace(model, names, tensors, constants, shapes, aliases)
        if entry:
            entry.store(traced)
    captured = traced.module
    _own_tensors(captured, aliases, computed_buffers(model) if is_hollow(model) else {})
    captured.train(model.training)
    program = Program(
        module=captured,
        spec=traced.spec,
        sites=traced.sites,
        aliases=aliases,
        symbols=traced.symbols,
        extras=_unused(model, captured, aliases),
        state_names=tuple(model.state_dict(keep_vars=True)),
        sample={n: t.detach() for n, t in tensors.items()},
        generation=_generation(model),
        cached=entry.note if entry else "",
    )
    return program


def _trace(
    model: nn.Module,
    names: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    constants: Mapping[str, Any],
    shapes: dict[str, dict[int, Any]],
    aliases: Mapping[str, str],
) -> Traced:
    """Exports a model, brings the graph into canonical form and finds its sites."""
    hollow = is_hollow(model)
    given = {n: t.to("meta") for n, t in tensors.items()} if hollow else tensors
    with buffers_on_meta(model) if hollow else contextlib.nullcontext():
        exported = _export(model, _at_least_two(given, shapes), constants, shapes)
    gm = exported.module(check_guards=False)
    canonicalize(gm, aliases)
    restore_modes(gm)
    gm.graph._tracer_cls = None
    captured = GraphModule(gm, gm.graph, class_name=type(model).__name__)
    captured._tracer_cls = None  # pyright: ignore[reportArgumentType]
    symbols, spec = _spec(captured, exported, tensors, names, constants)
    return Traced(captured, spec, discover(captured, aliases, given), symbols)


def _generation(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    names = ("eos_token_id", "pad_token_id")
    return {n: v for n in names if (v := getattr(config, n, None)) is not None}


def _bind(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Tensor], dict[str, Any]]:
    names, variadic = forward_parameters(model.forward)
    if variadic and args:
        raise CaptureError(
            f"{type(model).__name__}.forward takes *args, so positional inputs have no names. "
            "Wrap it in a module whose forward names its inputs."
        )
    if len(args) > len(names):
        raise CaptureError(
            f"{len(args)} positional inputs, but forward takes {len(names)}: {', '.join(names)}."
        )
    given: dict[str, Any] = dict(zip(names, args, strict=False))
    given.update(kwargs)
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, item in given.items():
        if isinstance(item, Tensor):
            tensors[name] = item
        elif isinstance(item, bool | int | float | str):
            constants[name] = item
        elif item is not None:
            raise CaptureError(
                f"input {name!r} is a {type(item).__name__}; capture takes tensors, numbers, "
                "strings and booleans. Wrap the model so that its forward takes plain tensors."
            )
    if not tensors:
        raise CaptureError("capture needs at least one example tensor: pass args=... or kwargs=...")
    return names, tensors, constants


def _dynamic_shapes(tensors: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, dict[int, Any]]:
    if dynamic is None:
        return {name: {} for name in tensors}
    if isinstance(dynamic, Mapping):
        unknown = sorted(set(dynamic) - set(tensors))
        if unknown:
            raise CaptureError(f"dynamic names {unknown}, but the inputs are {sorted(tensors)}.")
        return {n: {axis: Dim.AUTO for axis in dynamic.get(n, {})} for n in tensors}
    if dynamic != "auto":
        raise CaptureError(f"dynamic must be 'auto', None or a mapping, not {dynamic!r}.")
    shapes: dict[str, dict[int, Any]] = {}
    for name, tensor in tensors.items():
        axes = [0] if tensor.dim() else []
        discrete = not tensor.is_floating_point()
        if (discrete and tensor.dim() >= 2) or tensor.dim() == 3:
            axes.append(1)
        shapes[name] = {axis: Dim.AUTO for axis in axes}
    return shapes


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


@contextlib.contextmanager
def _export_mode(model: nn.Module, constants: Mapping[str, Any]) -> Iterator[None]:
    """Training mode, no cache, constants bound; everything is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in modes if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", None)]
    bound = "forward" in model.__dict__
    forward = model.forward
    try:
        for module in modes:
            module.training = True
        for config in cached:
            config.use_cache = False
        if constants:
            model.forward = functools.partial(forward, **constants)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in cached:
            config.use_cache = True
        if constants:
            if bound:
                model.forward = forward
            else:
                del model.forward


def _export(
    model: nn.Module,
    example: dict[str, Tensor],
    constants: Mapping[str, Any],
    shapes: dict[str, dict[int, Any]],
) -> torch.export.ExportedProgram:
    try:
        with _export_mode(model, constants), torch.enable_grad(), quiet():
            return torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        remedy = next(
            (r for key, r in _REMEDIES if key in text),
            "Check that the model runs on these inputs with model.train(); "
            "try dynamic=None to see whether a dynamic size is the cause.",
        )
        reason = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: {type(error).__name__}: {reason[:300]} "
            f"{_user_line(error)}{remedy}"
        ) from error


def _user_line(error: BaseException) -> str:
    found = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and "peftfx" not in name and "/rewriter/" not in name:
            found = f"At {name.rpartition('/')[2]}:{trace.tb_lineno}. "
        trace = trace.tb_next
    return found


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    both: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in both:
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases


def _own_tensors(
    gm: GraphModule, aliases: Mapping[str, str], computed: Mapping[str, Tensor]
) -> None:
    own: dict[int, nn.Parameter] = {}
    for name, parameter in list(gm.named_parameters(remove_duplicate=False)):
        if name in aliases:
            continue
        data = parameter.detach()
        fresh = nn.Parameter(
            data.clone() if parameter.requires_grad else data, parameter.requires_grad
        )
        own[id(parameter)] = fresh
        set_attribute(gm, name, fresh)
    updated = state_buffers(gm)
    for name, buffer in list(gm.named_buffers()):
        buffer = computed.get(name, buffer)
        set_attribute(gm, name, buffer.detach().clone() if name in updated else buffer.detach())


def _unused(
    model: nn.Module, captured: GraphModule, aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    held = {n for n, _ in captured.named_parameters()} | {n for n, _ in captured.named_buffers()}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if aliases.get(name, name) not in held
    }


def _spec(
    gm: GraphModule,
    exported: torch.export.ExportedProgram,
    tensors: Mapping[str, Tensor],
    parameters: tuple[str, ...],
    constants: Mapping[str, Any],
) -> tuple[dict[str, str], InputSpec]:
    """Names the symbols (`batch`, `sequence`, ...) and records what the graph accepts."""
    symbols: dict[str, str] = {}
    batches: dict[int, str] = {}
    inputs: list[TensorInput] = []
    ranges: dict[str, tuple[int, int | None]] = {}
    constraints = {str(k): v for k, v in exported.range_constraints.items()}
    for name, node in placeholders(gm).items():
        tensor = tensors[name]
        sizes: list[int | str] = []
        dims: tuple[Any, ...] = shape(node) or ()
        for axis, size in enumerate(dims):
            if isinstance(size, int):
                sizes.append(size)
                continue
            symbol = str(size)
            if symbol not in symbols:
                if axis == 0:
                    label = batches.setdefault(
                        tensor.shape[0], "batch" if not batches else f"batch_{len(batches) + 1}"
                    )
                else:
                    count = len({v for v in symbols.values() if v.startswith("sequence")})
                    label = "sequence" if not count else f"sequence_{count + 1}"
                symbols[symbol] = label
            label = symbols[symbol]
            sizes.append(label)
            bound = constraints.get(symbol)
            high = None
            low = 1
            if bound is not None:
                high = int(bound.upper) if bound.upper.is_finite and bound.upper < 2**31 else None
                low = int(bound.lower) if int(bound.lower) > 2 else 1
            known = ranges.get(label)
            if known is not None:
                low = max(low, known[0])
                high = min((h for h in (high, known[1]) if h is not None), default=None)
            ranges[label] = (low, high)
        fill = _fill(tensor)
        inputs.append(TensorInput(name, tuple(sizes), tensor.dtype, fill))
    return symbols, InputSpec(tuple(inputs), ranges, parameters, dict(constants))


def _fill(tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return True
    if tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.is_meta:
        return 1  # as an id, a position or a mask the likeliest to be valid
    return int(tensor.max())
