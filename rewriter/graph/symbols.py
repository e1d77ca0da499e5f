"""Dynamic sizes as text and back: symbols, their ranges and what is known about them.

A captured graph's fake values stand on a shape environment. It is written as the symbols in order
of creation and the guards in order of discovery; reading replays both, so that a later edit that
would fix a size is found just as on the first day. Expressions are parsed here, never evaluated.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import operator
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from .aten import placeholders, shape

_FUNCTIONS: dict[str, Any] = {
    "Eq": sympy.Eq, "Ne": sympy.Ne, "And": sympy.And, "Or": sympy.Or, "Not": sympy.Not,
} | {
    n: getattr(functions, n)
    for n in ("Mod", "PythonMod", "FloorDiv", "CleanDiv", "Max", "Min", "IntTrueDiv", "CeilDiv",
              "PowByNatural")
    if hasattr(functions, n)
}  # fmt: skip
_BINARY: dict[type[ast.operator], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Pow: operator.pow, ast.FloorDiv: functions.FloorDiv,
    ast.BitOr: sympy.Or, ast.BitAnd: sympy.And,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.Invert: sympy.Not,
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Lt: sympy.Lt, ast.LtE: sympy.Le, ast.Gt: sympy.Gt, ast.GtE: sympy.Ge,
}  # fmt: skip
_LIMIT = 2**62
_FRESH_HINT = 8
_FRESH: weakref.WeakKeyDictionary[Any, dict[str, list[Any]]] = weakref.WeakKeyDictionary()
"""Symbols of `fresh_size`, by mode and label."""
_TEXT = 4096
_DEPTH = 250
"""Longest expression that is read, in characters."""
_NAME = re.compile(r"s\d{1,4}")
_BITS = 256
"""Size of the largest number that an expression may have on the way."""


def unify(gm: GraphModule, names: Mapping[str, str]) -> bool:
    """Lets input sizes of one name, which every call must give equal, be one symbol.

    A model may read ids and mask without a product of the two that the graph shows.

    Returns:
        Whether they were not yet: then fake values may have to be refreshed (`refresh_sizes`).
    """
    known: dict[str, Any] = {}
    new = False
    for source in placeholders(gm).values():
        for extent in shape(source) or ():
            label = names.get(str(extent))
            if label is None or isinstance(extent, int):
                continue
            first = known.setdefault(label, extent)
            if first.node.hint == extent.node.hint and first is not extent:
                new |= first.node.expr != extent.node.expr
                bool(first == extent)
    return new


def refresh_sizes(gm: GraphModule) -> None:
    """Lets the sizes of all fake values say what they have been found to be."""
    settled = _Settled()
    for node in list(gm.graph.nodes):
        if "val" not in node.meta:
            continue
        node.meta["val"] = pytree.tree_map(settled, node.meta["val"])
        if type(node.meta["val"]) is int and node.op == "call_function":
            node.replace_all_uses_with(node.meta["val"])  # pyright: ignore[reportArgumentType]
            gm.graph.erase_node(node)


class _Settled:
    """Fake values whose sizes say what they have been found to be: numbers, or other symbols.

    Torch computes the bytes of a tensor once, with the symbols of that time, and compares them
    with sizes of today, which looks like a guard. Making a tensor of symbolic sizes takes torch
    milliseconds: what nodes share they share afterwards, and equal ones stand on one meta tensor.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Any]] = {}
        self.extents: dict[Any, Tensor] = {}

    def __call__(self, val: Any) -> Any:
        if isinstance(val, torch.SymInt):
            return _number_or_size(val)
        if not isinstance(val, FakeTensor):
            return val
        if id(val) not in self.known:
            self.known[id(val)] = val, self._made(val) if _is_stale(val) else val
        return self.known[id(val)][1]

    def _made(self, val: FakeTensor) -> FakeTensor:
        sizes, steps = (tuple(map(_number_or_size, s)) for s in (val.shape, val.stride()))
        names = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in (*sizes, *steps))
        key = len(sizes), names, val.dtype, val.fake_mode
        if key not in self.extents:
            self.extents[key] = torch.empty_strided(sizes, steps, dtype=val.dtype, device="meta")
        return FakeTensor(val.fake_mode, self.extents[key].detach(), val.device)


def _number_or_size(size: Any) -> Any:
    if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
        return int(size.node.expr)
    return size


def _is_stale(val: FakeTensor) -> bool:
    sizes = [s.node for s in (*val.shape, *val.stride()) if isinstance(s, torch.SymInt)]
    own = symbols_in([val.untyped_storage().nbytes()])
    return any(s._expr != s.expr for s in sizes) or not own <= symbols_in([val])


def symbols_in(values: Iterable[Any]) -> set[Any]:
    """The symbols that sizes of fake values are made of."""
    symbols: set[Any] = set()
    for item in pytree.tree_leaves(list(values)):
        sizes = (*item.shape, *item.stride()) if isinstance(item, Tensor) else (item,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    return symbols


def fresh_size(gm: GraphModule, mode: Any, label: str) -> Any:
    """A symbolic size, 2 at least, that nothing in the graph has and nothing relates to others.

    Another program of the same mode may have it: then what was evaluated for that one (`memo`) is
    known for this one.
    """
    from torch._dynamo.source import ConstantSource  # slow to import, and rarely needed

    environment = mode.shape_env
    used = symbols_in(n.meta.get("val") for n in gm.graph.nodes)
    fresh = _FRESH.setdefault(mode, {}).setdefault(label, [])
    for symbol in fresh:
        if symbol not in used:
            return environment.create_symintnode(symbol, hint=_FRESH_HINT)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # pyright: ignore[reportCallIssue]
    source = ConstantSource(f"{label}_{len(environment.var_to_range)}")
    like = mode.from_tensor(torch.empty(_FRESH_HINT), symbolic_context=context, source=source)
    fresh.append(like.shape[0].node.expr)
    return like.shape[0]


def write_environment(environment: Any, used: Collection[Any]) -> dict[str, Any]:
    """What a shape environment knows of some symbols, as JSON.

    Programs that were made from one another share an environment; `used` are one graph's symbols.

    Raises:
        ValueError: it holds sizes that depend on data.
    """
    hints = _hints(environment)
    symbols: list[list[Any]] = []
    for symbol, bound in environment.var_to_range.items():
        if symbol not in used:
            continue
        if symbol not in hints or not str(symbol).startswith("s"):
            raise ValueError(f"the size {symbol} depends on data")
        high = int(bound.upper) if bound.upper.is_finite and bound.upper < _LIMIT else None
        symbols.append([str(symbol), int(hints[symbol]), int(bound.lower), high])
    guards = [g.expr for g in environment.guards if g.expr.free_symbols <= set(used)]
    return {"symbols": symbols, "guards": [str(g) for g in guards]}


def _hints(environment: Any) -> Mapping[Any, Any]:
    attributes = environment.__dict__
    return attributes.get("backed_var_to_val") or attributes.get("var_to_val") or {}


class Symbols:
    """A shape environment read back, with the fake values that live in it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.environment: Any = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # as in `tracing`: it costs more than it saves
        self.names: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}
        for name, hint, low, high in data["symbols"]:
            self._create(name, int(hint), int(low), high)
        for guard in data["guards"]:
            if not self._holds(guard):
                raise ValueError(f"the guard {guard} does not hold")

    def _create(self, name: str, hint: int, low: int, high: int | None) -> None:
        bounds = (low, hint, *([] if high is None else [high]))
        sizes = all(type(n) is int and 0 <= n <= _LIMIT for n in bounds)
        if not _NAME.fullmatch(name) or not sizes:
            raise ValueError(f"{name!r} in {low}..{high} is no size")
        from torch._dynamo.source import ConstantSource  # late: it imports triton

        # A symbol's number is drawn from a hash of its source; find a source that gives ours.
        number = int(name[1:])
        sources = (f"size{i}" for i in itertools.count())
        source = next(s for s in itertools.islice(sources, 10**5) if _number(s) == number % 100)
        taken: set[int] = self.environment.unique_ids
        before = set(range(number % 100, number)) - taken  # numbers are counted on where taken
        taken |= before
        symbol = self.environment.create_symbol(
            hint, source=ConstantSource(source), dynamic_dim=DimDynamic.DYNAMIC
        )
        taken -= before
        if str(symbol) != name:
            raise ValueError(f"the symbol {name} cannot be made again")
        upper = sympy.Integer(high) if high is not None else int_oo
        self.environment.var_to_range[symbol] = ValueRanges(sympy.Integer(low), upper)
        self.names[name] = symbol

    def _holds(self, guard: str) -> bool:
        expression = self._parse(guard)
        try:
            return bool(self.environment.evaluate_expr(expression))
        except AssertionError as error:  # torch's, where it leaves a size no value, or not its own
            raise ValueError(f"the guard {guard} contradicts the sizes: {error}") from error

    def expression(self, text: str) -> Any:
        """`text` as a SymInt (or an int, if it is constant)."""
        if text not in self._made:
            parsed = sympy.sympify(self._parse(text))
            hint = int(parsed.xreplace(dict(_hints(self.environment))))
            self._made[text] = self.environment.create_symintnode(parsed, hint=hint)
        return self._made[text]

    def tensor(self, key: str, dtype: torch.dtype, device: str, sizes: Any, strides: Any) -> Any:
        """A fake tensor; equal ones are one object."""
        if key not in self._tensors:
            shape = [s if isinstance(s, int) else self.expression(s) for s in sizes]
            steps = [s if isinstance(s, int) else self.expression(s) for s in strides]
            meta = torch.empty_strided(shape, steps, dtype=dtype, device="meta")
            self._tensors[key] = FakeTensor(self.mode, meta, torch.device(device))
        return self._tensors[key]

    def _parse(self, text: str) -> Any:
        return self._build(parse_expression(text))

    def _build(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return _small(sympy.Integer(number))
            case ast.Name(id=name):
                return self.names[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self._build(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _binary(_BINARY[type(op)], self._build(left), self._build(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return _COMPARE[type(op)](self._build(left), self._build(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
                name in _FUNCTIONS
            ):
                parts = [self._build(a) for a in arguments]
                if name == "PowByNatural" and len(parts) == 2:
                    return _binary(_FUNCTIONS[name], *parts)
                return _small(_FUNCTIONS[name](*parts))
            case _:
                raise ValueError(f"{ast.unparse(node)} is not an expression of sizes")


def parse_expression(text: str) -> ast.expr:
    """The syntax tree of an expression in a file.

    Raises:
        ValueError: it is none, or longer than any real one.
    """
    if not isinstance(text, str) or len(text) > _TEXT:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"an expression is longer than {_TEXT} characters, or no text")
    try:
        return shallow(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text[:80]!r} is not an expression of sizes") from error


def shallow(tree: ast.expr) -> ast.expr:
    """The tree, whose evaluation must not depend on how deep calls may go in this process.

    Raises:
        ValueError: it is nested deeper than any real one.
    """
    level: list[ast.AST] = [tree]
    for _ in range(_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    raise ValueError(f"an expression is nested deeper than {_DEPTH}")


def _binary(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    power = operation in (operator.pow, _FUNCTIONS.get("PowByNatural"))
    if power and not (right.is_Integer and 0 <= int(right) <= 64):
        raise ValueError(f"the exponent {right} is not one of 0 to 64")
    if power and left.is_Integer and int(left).bit_length() * int(right) > _BITS:
        raise ValueError(f"{left} ** {right} is larger than any size")
    return _small(operation(left, right))


def _small(number: Any) -> Any:
    """ValueError for a constant beyond all sizes; anything else as it is."""
    if number.is_Integer and int(number).bit_length() > _BITS:
        raise ValueError(f"a number of {int(number).bit_length()} bits is no size")
    return number


def _number(source: str) -> int:
    return int(hashlib.sha256(source.encode()).hexdigest(), 16) % 100
