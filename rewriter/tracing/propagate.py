"""Keeps the fake values of a graph true after an edit, at the cost of what the edit touched.

Recomputes nodes whose inputs changed, in order, and stops where shape and dtype stay the same; what
equals an evaluation before is not evaluated again (`memo`).
A pass that makes a size fixed would add a guard to the shape environment; that is an error.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx import GraphModule, Node
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import PassError
from ..graph.aten import ATEN, alike, attribute, source_line, value
from ..graph.modes import Attention
from ..graph.symbols import refresh_sizes, unify
from ..graph.turns import alone
from ..program.state import State
from .memo import Memo, repeats


class _SizeFixedError(PassError):
    """An operation asked for a guard, which would fix or narrow a size."""


_FIXING = (_SizeFixedError, symbolic_shapes.GuardOnDataDependentSymNode)


_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException)


def fake_mode(gm: GraphModule) -> Any:
    """The FakeTensorMode of a captured graph's recorded values."""
    for node in gm.graph.nodes:
        val = value(node)
        if isinstance(val, Tensor) and hasattr(val, "fake_mode"):
            return val.fake_mode  # pyright: ignore[reportAttributeAccessIssue]
    return None


def _on_meta(gm: GraphModule) -> bool:
    values = (value(n) for n in gm.graph.nodes)
    return any(isinstance(v, Tensor) and v.device.type == "meta" for v in values)


class _Fakes:
    """Fake counterparts of the stored tensors, made once, and evaluations of nodes with them.

    Args:
        ranges: what the program narrows symbols to, see `_ranges`.
    """

    def __init__(self, gm: GraphModule, mode: Any, ranges: Any = ()) -> None:
        self.gm, self.mode = gm, mode
        self.made: dict[int, Tensor] = {}
        self.meta = _on_meta(gm)
        self.memo = Memo(mode, (ranges, self.meta))

    def tensor(self, real: Tensor) -> Tensor:
        if id(real) not in self.made:
            # In a graph without storage, adapters and computed buffers may have some.
            like = real.to("meta") if self.meta else real
            self.made[id(real)] = self.mode.from_tensor(like, static_shapes=True)
        return self.made[id(real)]

    def run(self, node: Node) -> Any:
        def load(n: Node) -> Any:
            if n.op == "get_attr":
                item = attribute(self.gm, str(n.target))
                return self.tensor(item) if isinstance(item, Tensor) else item
            return n.meta["val"]

        loaded: Any = map_arg((node.args, node.kwargs), load)
        args, kwargs = loaded
        if node.op == "get_attr":
            return load(node)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if getattr(module, "chooses_sizes", False) and "val" in node.meta:
                return node.meta["val"]
            return self.memo.evaluate(
                module, loaded, lambda: self.state(module), lambda: self.called(module, *loaded)
            )
        if node.op == "call_function" and repeats(node.target):
            return self.memo.evaluate(
                node.target, loaded, dict, lambda: self.applied(node.target, *loaded)
            )
        if node.op == "call_method":
            return self.applied(getattr(args[0], str(node.target)), args[1:], kwargs)
        return self.applied(node.target, args, kwargs)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The fakes of a module's tensors, by name."""
        tensors = (*module.named_parameters(), *module.named_buffers())
        return {name: self.tensor(tensor) for name, tensor in tensors}

    def called(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Evaluates a module."""
        if isinstance(module, Attention):
            return self.applied(module.abstract, args[:3], {})
        with self.mode, _Layouts(self.mode.shape_env), enable_python_dispatcher():
            return torch.func.functional_call(module, self.state(module), args, kwargs)

    def applied(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Evaluates a function."""
        with self.mode, _Layouts(self.mode.shape_env), enable_python_dispatcher():
            return target(*args, **kwargs)


_STRICT = ("frozen", "_error_on_new_guards")
"""What makes a shape environment refuse guards."""


class _Layouts(TorchDispatchMode):
    """Lets convolutions choose a memory layout by the size of the batch, which fixes no size."""

    def __init__(self, environment: Any) -> None:
        super().__init__()
        self.environment = environment

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what runs under it is not compiled; keeping torch's compiler out costs more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.environment is None or func is not ATEN.convolution.default:
            return func(*args, **(kwargs or {}))
        saved = {n: getattr(self.environment, n, False) for n in _STRICT}
        try:
            self.environment.__dict__.update(dict.fromkeys(_STRICT, False))
            with self.environment.suppress_guards():
                return func(*args, **(kwargs or {}))
        finally:
            self.environment.__dict__.update(saved)


@contextlib.contextmanager
def _no_new_guards(environment: Any) -> Iterator[None]:
    """Makes an operation that would fix or narrow a size fail instead."""
    if environment is None:
        yield
    elif hasattr(environment, "error_on_new_guards"):
        try:
            with environment.error_on_new_guards():
                yield
        except symbolic_shapes._ShapeEnvGuardError as error:
            raise _SizeFixedError(str(error)) from error
    else:  # before torch 2.13: found afterwards
        count = len(environment.guards)
        yield
        if len(environment.guards) > count:
            raise _SizeFixedError(f"guard {environment.guards[-1].expr}")


@contextlib.contextmanager
def _ranges(environment: Any, program: State) -> Iterator[tuple[tuple[str, int], ...]]:
    """Tells the shape environment the program's own input ranges while it works; gives what they
    narrow, symbols with the largest size."""
    if environment is None:
        yield ()
        return
    saved = dict(environment.var_to_range)
    narrowed: list[tuple[str, int]] = []
    try:
        for symbol, bound in saved.items():
            _, high = program.spec.ranges.get(program.symbols.get(str(symbol), ""), (1, None))
            if high is not None and bound.upper > high:
                environment.var_to_range[symbol] = type(bound)(bound.lower, high)
                narrowed.append((str(symbol), high))
        environment._update_version_counter()
        yield tuple(narrowed)
    finally:
        environment.var_to_range.update(saved)
        environment._update_version_counter()


Explain = Callable[[Node, str, str], str]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences torch's own log of problems that become errors of ours."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes",
             "torch.export", "torch.fx.experimental")  # fmt: skip
    loggers = [logging.getLogger(n) for n in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def propagate(program: State, method: str = "", explain: Explain | None = None) -> int:
    """Recomputes the fake values of new nodes and of nodes downstream whose shapes change.

    Args:
        method: text name of the pass that edited the program, for messages.
        explain: what to say of a node that fails (the node; `value`, `size` or `shape`; torch's
            error); empty where torch's error says all.

    Returns:
        How many nodes were computed.

    Raises:
        PassError: shapes do not fit, or the edit fixed a dynamic size.
    """
    gm = program.module
    mode = fake_mode(gm)
    if mode is None:
        return 0
    with alone(), _ranges(mode.shape_env, program) as ranges, quiet():
        if unify(gm, program.symbols):
            refresh_sizes(gm)
        return _propagate(gm, _Fakes(gm, mode, ranges), method, explain)


def _propagate(gm: GraphModule, fakes: _Fakes, method: str, explain: Explain | None) -> int:
    environment = fakes.mode.shape_env
    changed: set[Node] = set()
    computed = 0
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        fresh = "val" not in node.meta
        if not fresh and not any(i in changed for i in node.all_input_nodes):
            continue
        computed += 1
        try:
            with torch.no_grad(), _no_new_guards(environment):
                result = fakes.run(node)
        except Exception as error:
            fixed = isinstance(error, _FIXING)
            cause = "value" if isinstance(error, _VALUES) else "size" if fixed else "shape"
            if explain is not None and (said := explain(node, cause, str(error))):
                raise PassError(f"{method}: {said}" if method else said) from error
            line = source_line(node)
            what = "the edit fixes a dynamic size" if fixed else "shapes do not fit"
            raise PassError(
                f"{what} at {node.name} ({line or node.format_node()}): {error}"
            ) from error
        previous = node.meta.pop("previous", None)  # what the readers of a new node have seen
        before = previous if fresh else value(node)
        node.meta["val"] = result
        if before is None or not alike(before, result):
            changed.add(node)
    return computed
