"""Seeded mutations: one wrong line each in a pass, a branch, a reader or the core, and the models
that they are tried on.

A mutation swaps the code of one function, wherever that function is referred to; its probe
(`tests/mutant_probes.py`) passes without it (`tests/test_mutations.py`, `benchmarks/mutations.py`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

import peftfx

from . import recipes
from .models import Decoder, DecoderLayer, Fused, batch, randomise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Mutation:
    """One wrong line.

    Attributes:
        kind: what is wrong.
        where: `folder/file.py:Class.function`.
        old, new: text of that function, which holds `old` once.
        probe: what must fail.
    """

    kind: str
    where: str
    old: str
    new: str
    probe: Callable[[Case], None]

    @property
    def name(self) -> str:
        return f"{self.where}: {self.old} -> {self.new}"


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """Lets the function compute the wrong thing meanwhile."""
    file, _, qualified = mutation.where.partition(":")
    module: Any = importlib.import_module("peftfx." + file.removesuffix(".py").replace("/", "."))
    function: Any = functools.reduce(getattr, qualified.split("."), module)
    function = function.fget if isinstance(function, property) else function
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    path = Path(module.__file__)
    source = path.read_text()
    (node,) = [n for n in _functions(ast.parse(source).body, "") if n[0] == qualified]
    lines = source.splitlines(keepends=True)
    begin, end = node[1].lineno - 1, node[1].end_lineno
    text = "".join(lines[begin:end])
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: the function holds that {text.count(mutation.old)}x.")
    changed = "".join(lines[:begin]) + text.replace(mutation.old, mutation.new)
    code = _code(compile(changed + "".join(lines[end:]), str(path), "exec"), qualified)
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before


def _functions(body: list[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def _code(code: CodeType, qualified: str) -> CodeType:
    stack = [code]
    while stack:
        each = stack.pop()
        if each.co_qualname == qualified:
            return each
        stack.extend(c for c in each.co_consts if isinstance(c, CodeType))
    raise LookupError(qualified)


# What probes run on.


class Square(Decoder):
    """One block whose matrices are all square, so that a wrong axis is no error of shapes."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(32, 0, tied)
        self.layers.append(DecoderLayer(32, 4, 4, 32))

    def angles(self, t: int) -> tuple[Tensor, Tensor]:
        cos, sin = super().angles(t)
        return cos.to(self.head.weight.dtype), sin.to(self.head.weight.dtype)


class Open(Square):
    """The same, and every token sees all that are no padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.bool()[:, None, None, :]
        h = self.layers[0](self.embed(input_ids), *self.angles(input_ids.shape[1]), mask)
        return self.head(self.norm(h))


class Short(Fused):
    """One block with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers[1]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "decoder": Square, "grown": Square, "open": Open, "tied": lambda: Square(tied=True), "fused": Short,
}  # fmt: skip


@functools.cache
def base(name: str, dtype: torch.dtype) -> tuple[Any, peftfx.Program]:
    """A model and its program."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval().requires_grad_(name == "grown")
    inputs = batch()
    if name == "fused":
        del inputs["attention_mask"]
    return model, peftfx.capture(model, kwargs=inputs)


@dataclass(frozen=True)
class Case:
    """A dtype and a seed."""

    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __getitem__(self, name: str) -> tuple[Any, peftfx.Program]:
        """As the fixture `captured` of registered checks."""
        return base("decoder" if name == "encoder" else name, self.dtype)

    def placed(self, name: str, method: str) -> peftfx.Program:
        """As the fixture's, but run again each time: a mutation is under way."""
        return peftfx.run(*recipes.start(self[name][1], method))

    def made(self, recipe: str, name: str = "decoder", by: float = 0.3) -> peftfx.Program:
        """A recipe with values that are not its initial ones."""
        return randomise(peftfx.run(self[name][1], recipe), by, self.seed)

    def near(self, want: Tensor, got: Tensor, base: Tensor, what: str) -> None:
        """Equal up to a small share of what the adapter does."""
        want, got, base = want.double(), got.double(), base.double()
        limit = 1e-4 if self.dtype == torch.float32 else 0.1
        effect, error = float((want - base).norm()), float((got - want).norm())
        assert effect > 0.02 * float(base.norm()), f"{what}: nothing is tried"
        assert error <= limit * effect, f"{what}: off by {error / effect:.2g} of the effect"
