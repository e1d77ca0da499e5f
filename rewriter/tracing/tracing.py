"""Running `torch.export` on a model without changing the model, and explaining its failures."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import embedding_bag
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..graph.modes import MODES
from ..program.state import BRANCHES
from .propagate import quiet
from .unstacking import PiecesUsedError, Rows

Arguments = Callable[[Mapping[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
"""From flat tensors to the positional and keyword arguments of a model's own forward."""

RESERVED = {BRANCHES, MODES, f"{BRANCHES}_outlined"}
_NO_MODEL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")
"""What the files of frames start with that are no line of a model."""
_LAYERS = os.path.join(os.path.dirname(torch.__file__), "nn") + os.sep

_EXPORTED = {"_in_spec", "_out_spec", "shape_env"}
"""What `torch.export` puts on a graph module beside what `torch.fx` does."""

_BRANCHES = "its forward decides by the values of tensors, which one graph cannot"
_REMEDIES = (
    ("data-dependent", _BRANCHES, "Use torch.where or torch.cond there."),
    ("DataDependent", _BRANCHES, "Use torch.where or torch.cond there."),
    ("Could not guard", _BRANCHES, "Use torch.where or torch.cond there."),
    ("int() argument must be", _BRANCHES, "Use torch.where or torch.cond there."),
    ("aliases", "it returns views of its inputs", "Return fresh tensors instead."),
    ("Unsupported", "it calls what cannot be traced", "Write that with plain torch operations."),
    ("device", "its tensors are on several devices",
     "Move the example inputs to the device of the model's parameters."),
    ("dtype", "dtypes do not fit", "Give the example inputs the dtype that the model expects."),
)  # fmt: skip
"""A word in torch's error, what it means, and what to do. (A loop over as many parts as values say
fails where torch asks for an int of their unknown number.)"""

_EXPERTS = (
    "If that is a loop over the experts of a transformers model, set "
    "config._experts_implementation = 'grouped_mm' (or 'batched_mm') and capture again."
)


def check_model(model: nn.Module) -> None:
    """Refuses what cannot be traced before torch fails in an obscure way.

    Raises:
        CaptureError: a scripted model, or parameters that are not initialised yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is TorchScript, whose Python forward is lost. Capture the "
            "module that was scripted."
        )
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    lazy = [n for n, t in tensors if torch.nn.parameter.is_lazy(t)]
    if lazy:
        raise CaptureError(
            f"{type(model).__name__} has lazy parameters without a shape ({', '.join(lazy[:3])}). "
            "Run it once on an example, then capture it."
        )
    packed = [(n, t) for n, t in model.named_parameters() if _is_packed(t)]
    if packed:
        name, tensor = packed[0]
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise CaptureError(
            f"{len(packed)} weights of {type(model).__name__} (first: {name!r}) are {kind} "
            f"({tensor.dtype}): quantised in a format of that library, whose layers run kernels "
            "that cannot be traced. Capture the model in floating point: load it without its "
            "quantization_config, or call model.dequantize() if it has that. To train over "
            "integers, quantise the program itself: run(program, 'peqa{bits=4}')."
        )
    inference = [n for n, t in model.named_parameters() if t.is_inference()]
    if inference:
        raise CaptureError(
            f"{inference[0]!r} and {len(inference) - 1} more parameters were made under "
            "torch.inference_mode, where nothing can ever be trained. Build or load the model "
            "outside of it."
        )
    own = {*model._modules, *model._parameters, *model._buffers}
    for name in sorted(own & RESERVED):
        raise CaptureError(
            f"{type(model).__name__} has a child or tensor called {name!r}, the name below which "
            "captured programs keep what they add. Rename it."
        )
    for name in sorted(own & _graph_names()):
        raise CaptureError(
            f"{type(model).__name__} has a child or tensor called {name!r}, which graph modules "
            "of torch.fx use themselves. Rename it, or put the model into another: a module whose "
            "one child is the model, and whose forward calls it."
        )


def _is_packed(parameter: Tensor) -> bool:
    """Whether a parameter holds a matrix in a code of its own class. Plain integer parameters are
    none: the forward that reads them says what they mean."""
    if getattr(parameter, "quant_state", None) is not None:
        return True
    kind = type(parameter)
    own = issubclass(kind, nn.Parameter) and kind is not nn.Parameter
    return own and not (parameter.is_floating_point() or parameter.is_complex())


@functools.cache
def _graph_names() -> frozenset[str]:
    """What graph modules have that modules have not: as a model's names, these would be hidden."""
    graph = torch.fx.Graph()
    graph.output(None)
    attributes = set(dir(torch.fx.GraphModule(nn.Module(), graph))) | _EXPORTED
    return frozenset(attributes - set(dir(nn.Module())))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`'s and data-parallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextlib.contextmanager
def prepared(model: nn.Module, training: bool | None) -> Iterator[None]:
    """One mode for every submodule (None: its own) and no cache; all is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in modes if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", None)]
    try:
        for module in modes:
            module.training = modes[module] if training is None else training
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for config in cached:
            config.use_cache = True


@contextlib.contextmanager
def _flat_forward(model: nn.Module, names: tuple[str, ...], arguments: Arguments) -> Iterator[None]:
    """A forward that takes flat tensors by keyword and calls the model's own."""
    bound = model.__dict__.get("forward")
    forward = model.forward

    def flat(**tensors: Tensor) -> Any:
        args, kwargs = arguments(tensors)
        return forward(*args, **kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    described: Any = flat
    described.__signature__ = inspect.Signature([inspect.Parameter(n, keyword) for n in names])
    model.forward = flat
    try:
        yield
    finally:
        if bound is None:
            del model.forward
        else:
            model.forward = bound


def export(
    model: nn.Module,
    example: Mapping[str, Tensor],
    arguments: Arguments,
    shapes: dict[str, dict[int, Any]],
    training: bool = True,
) -> torch.export.ExportedProgram:
    """Exports `model` in one mode.

    Args:
        example: flat example inputs, no dynamic size below 2.
        arguments: how the model takes them.
        shapes: the dynamic axes of each.

    Raises:
        CaptureError: torch cannot trace it; the message says where and what to do.
    """
    plain = arguments(example) == ((), dict(example))
    flat = _flat_forward(model, tuple(example), arguments)
    try:
        with (
            prepared(model, training),
            contextlib.nullcontext() if plain else flat,
            quiet(),
            torch.enable_grad(),
        ):
            return _export(model, _distinct(example), shapes)
    except Exception as error:
        raise CaptureError(_explained(model, error)) from error


def _explained(model: nn.Module, error: Exception) -> str:
    """What went wrong, at which line of the model, what to do, and last what torch said."""
    text = f"{type(error).__name__}: {error}"
    what, remedy = next(
        ((what, remedy) for key, what, remedy in _REMEDIES if key in text),
        (
            "it fails while it is traced",
            "Check that the model runs on these inputs with model.train(); "
            "try dynamic=None to see whether a dynamic size is the cause.",
        ),
    )
    if what is _BRANCHES and any(hasattr(c, "_experts_implementation") for c in _configs(model)):
        remedy = f"{remedy} {_EXPERTS}"
    reason = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
    said = f"{type(error).__name__}: {reason[:300]}".rstrip(". ")
    line = _user_line(error)
    place = f" at {line}" if line else ""
    return f"{type(model).__name__} cannot be captured{place}: {what}. {remedy} (torch: {said}.)"


def _configs(model: nn.Module) -> list[Any]:
    return [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]


def _distinct(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, no tensor twice: torch traces one given as two inputs as the last of them,
    and `labels=input_ids` would make the program read its labels."""
    owners = {id(t): n for n, t in example.items()}
    return {n: t if owners[id(t)] == n else t.clone() for n, t in example.items()}


def _export(
    model: nn.Module, example: dict[str, Tensor], shapes: dict[str, dict[int, Any]]
) -> torch.export.ExportedProgram:
    trace = functools.partial(
        torch.export.export, model, (), example, dynamic_shapes=shapes, strict=False
    )
    with Data(), Bags(), _model_lines(), _uncached():
        try:
            with Rows():
                return trace()
        except PiecesUsedError:
            return trace()


def _uncached() -> contextlib.AbstractContextManager[None]:
    """Traces, and whatever is evaluated on their fake values later, without torch's cache of fake
    evaluations: where sizes are symbols, writing and checking an entry takes as long as evaluating.
    Evaluations that repeat are remembered in `memo`."""
    from torch._dynamo import config  # late: it imports triton

    return config.patch(fake_tensor_cache_enabled=False)


@contextlib.contextmanager
def _model_lines() -> Iterator[None]:
    """Lets torch note the model's own line for every assumption about a size, not one of torch's
    (unless the model is made of torch's modules alone)."""
    inner = getattr(ShapeEnv, "_get_user_frame", None)
    if inner is None:
        yield
        return

    def user_frame(environment: ShapeEnv) -> Any:
        frame, layer = sys._getframe(1), None
        while frame is not None and frame.f_code is not _export.__code__:
            name = frame.f_code.co_filename
            if not name.startswith(_NO_MODEL):
                return frame
            if layer is None and name.startswith(_LAYERS):
                layer = frame
            frame = frame.f_back
        return layer or inner(environment)

    ShapeEnv._get_user_frame = user_frame  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        ShapeEnv._get_user_frame = inner  # pyright: ignore[reportAttributeAccessIssue]


class Data(TorchFunctionMode):
    """Traces what goes through `tensor.data`, which tracing takes for a constant otherwise."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__self__", None) is not Tensor.data:
            return func(*args, **(kwargs or {}))
        if func.__name__ == "__get__":
            return args[0].detach()
        owner, given = args
        if owner.shape != given.shape or owner.dtype != given.dtype:
            raise CaptureError(
                f"a forward assigns {tuple(given.shape)} {given.dtype} to the .data of a tensor "
                f"that is {tuple(owner.shape)} {owner.dtype}. Assign it before capturing."
            )
        owner.detach().copy_(given)
        return None


class Bags(TorchFunctionMode):
    """Lets bags of equal sizes, `[rows, places]`, begin at so many places as there are rows; torch
    counts them as `(rows * places + places - 1) // places`, a size that equals none."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        ids = kwargs.get("input", args[0] if args else None)
        if func is not embedding_bag or not isinstance(ids, Tensor) or ids.dim() != 2:
            return func(*args, **kwargs)
        given = inspect.signature(embedding_bag).bind(*args, **kwargs).arguments
        if given.get("offsets") is not None:
            return func(*args, **kwargs)  # which torch refuses
        rows, places = ids.shape
        given["input"] = ids.reshape(-1)
        given["offsets"] = torch.arange(rows, dtype=ids.dtype, device=ids.device) * places
        if (weights := given.get("per_sample_weights")) is not None:
            given["per_sample_weights"] = weights.reshape(-1)
        return func(**given)


def _user_line(error: BaseException) -> str:
    """`file.py:line` of the innermost line outside of torch and of ours; '' where there is none."""
    line = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        ours = "peftfx" in name or "/rewriter/" in name
        if not (ours or "/torch/" in name or name.startswith("<")):
            line = f"{name.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line
