"""Programs held still to be measured: copies that share all storage, own their flags and modes,
and draw no random numbers.

The live module is left alone: another thread may be training it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.modes import Attention, Dropout
from ..graph.module import CapturedModule, state_tensors, twin_module
from ..graph.sharded import is_sharded, outputs, reshard
from ..program.state import State

ATEN: Any = torch.ops.aten


def still(program: State, updated: Collection[str] | None = None) -> CapturedModule:
    """A copy of a program's module in evaluation mode, to be measured.

    Parameters are objects of its own over the same memory, and require no gradients: torch picks
    the kernel of a product by that flag, and the last bit of the result depends on the kernel.
    Their version counters are their own, too, so they tell of writes by this copy alone. What
    a forward updates is copied: the tensors of these names, by default `state_tensors`.
    """
    gm = program.module
    reshard(gm)
    updated, memo = state_tensors(gm) if updated is None else updated, dict[int, Any]()
    for name, parameter in gm.named_parameters():
        memo[id(parameter)] = nn.Parameter(_own(parameter, name in updated), requires_grad=False)
    for name, buffer in gm.named_buffers():
        memo[id(buffer)] = _own(buffer, name in updated)
    return twin_module(gm, memo).eval()


def _own(tensor: Tensor, updated: bool) -> Tensor:
    if updated:
        return tensor.detach().clone()
    return tensor.detach() if is_sharded(tensor) else tensor.data


def stilled(program: State) -> State:
    """The program over a still copy of its module."""
    return replace(program, module=still(program))


def forward(gm: CapturedModule, inputs: Mapping[str, Tensor]) -> Any:
    """What a still module returns for a copy of the inputs, without gradients."""
    with torch.no_grad():
        return outputs(gm, {n: t.clone() for n, t in inputs.items()})


def is_modeless(gm: GraphModule, but: Collection[str] = ()) -> bool:
    """Whether nothing in a graph tells training from evaluation, or draws random numbers: it calls
    operators, and modules that both modes leave idle; those at the paths `but` may do anything."""
    calls = (n for n in gm.graph.nodes if n.op != "call_module" or n.target not in but)
    return all(_is_modeless(gm, node) for node in calls)


def _is_modeless(gm: GraphModule, node: Node) -> bool:
    target: Any = node.target
    if node.op == "call_module":
        module: Any = gm.get_submodule(target)
        kind = type(module)
        return (kind is Dropout and not module.p) or (kind is Attention and not module.dropout)
    if node.op == "call_function":
        known = isinstance(target, OpOverload) and not _is_random(target)
        return known or getattr(target, "__module__", "") == "_operator"
    return node.op != "call_method"


class Expected(TorchDispatchMode):
    """Random operators give their expected value: dropout keeps everything, noise is none.

    So training mode can be compared where one program draws more numbers than the other, and no
    generator moves, which other threads may draw from.

    Attributes:
        draws: how often each random operator ran, by its name, the shape of its operand and its
            numbers (the probability of a dropout).
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: Counter[tuple[Any, ...]] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what runs under it is not compiled; keeping torch's compiler out costs more

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func):
            return func(*args, **kwargs)
        names = [a.name for a in func._schema.arguments]
        if {"query", "key", "dropout_p"} <= set(names):
            return self._attention(func, dict(zip(names, args, strict=False)) | kwargs)
        numbers = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, int | float)]
        first = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else str(args)
        self.draws[func._schema.name, first, tuple(numbers)] += 1
        replacement = _EXPECTED.get(func.overloadpacket)
        if replacement is not None:
            return replacement(func, args, kwargs)
        return _seeded(func, args, kwargs)

    def _attention(self, func: Any, given: dict[str, Any]) -> Any:
        """A fused attention without its dropout, which is counted as the formula's own: on weights
        `[..., queries, keys]`. Which kernel runs depends on the mask, and is no noise."""
        if probability := given.get("dropout_p", 0.0):
            weights = (*given["query"].shape[:-1], given["key"].shape[-2])
            self.draws["aten::bernoulli_", weights, (1.0 - probability,)] += 1
        return func(**given | {"dropout_p": 0.0})


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _seeded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator without an expected value, from numbers that depend on nothing before it."""
    if any(a.name == "generator" for a in func._schema.arguments):
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        kwargs = {**kwargs, "generator": torch.Generator(device).manual_seed(0)}
        return func(*args, **kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return func(*args, **kwargs)


def _filled(of: Callable[..., float]) -> Callable[..., Any]:
    """In place: fills with what `of` says of the numbers given to the operator."""

    def fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        numbers = [a.default_value for a in func._schema.arguments[1:] if a.name != "generator"]
        for index, number in enumerate(args[1:]):
            numbers[index] = number
        names = [a.name for a in func._schema.arguments[1:]]
        for name, number in kwargs.items():
            if name in names and name != "generator":
                numbers[names.index(name)] = number
        return args[0].fill_(of(*numbers))

    return fill


def _bernoulli(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keeps with the probability of keeping: the scaled mask of dropout is one then."""
    target: Tensor = args[0]
    given = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    in_place = func._schema.name.endswith("_")
    if not in_place and func._overloadname != "p":
        given = target
    kept = given if isinstance(given, Tensor) else torch.full_like(target, given)
    if not target.is_floating_point():
        kept = kept >= 0.5
    return target.copy_(kept) if in_place else kept.to(target.dtype).clone()


def _dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    del func, kwargs
    return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)


def _constant(number: float) -> Callable[..., Any]:
    def constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        if func.overloadpacket in (ATEN.rand_like, ATEN.randn_like):
            return torch.full_like(args[0], number, **kwargs)
        return torch.full(args[0], number, **kwargs)

    return constant


_EXPECTED: dict[Any, Callable[..., Any]] = {
    ATEN.bernoulli: _bernoulli,
    ATEN.bernoulli_: _bernoulli,
    ATEN.native_dropout: _dropout,
    ATEN.rand: _constant(0.5),
    ATEN.rand_like: _constant(0.5),
    ATEN.randn: _constant(0.0),
    ATEN.randn_like: _constant(0.0),
    ATEN.uniform_: _filled(lambda low, high: (low + high) / 2),
    ATEN.normal_: _filled(lambda mean, _: mean),
}


@contextlib.contextmanager
def undisturbed(module: nn.Module, written: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """No gradients, the same random numbers every time; buffers, and the parameters that a
    forward writes, are put back afterwards.

    Yields their values from before.
    """
    parameters = [(n, p) for n, p in module.named_parameters() if n in written]
    tensors = [*module.named_buffers(), *parameters]
    kept = {n: b.detach().clone() for n, b in tensors}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            yield kept
    finally:
        for name, tensor in tensors:
            if not torch.equal(tensor, kept[name]):
                tensor.data.copy_(kept[name])
