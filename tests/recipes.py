"""Every pass's small recipe: the first line of its golden text, `# lora{rank=2}`.

A recipe may have several passes; the last one is the pass in question. What a registered test must
know about one method, that method's own test file says (see `stated`).
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peftfx
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

GOLDEN = Path(__file__).parent / "golden"


def recipe_of(name: str) -> str:
    """The small recipe of a pass; its bare name until it has a golden text."""
    path = GOLDEN / f"{name}.txt"
    return path.read_text().splitlines()[0].removeprefix("# ") if path.exists() else name


RECIPES = {name: recipe_of(name) for name in sorted(REGISTRY) if not REGISTRY[name].sourced}
METHODS = tuple(
    sorted(n for n, cls in REGISTRY.items() if issubclass(cls, Method) and not cls.sourced)
)
"""Those that run by their text alone; what needs sources has its own tests alone."""


def method_class(name: str) -> type[Method]:
    """The class of a method."""
    found = REGISTRY[name]
    if not issubclass(found, Method):
        raise TypeError(name)
    return found


def stated(name: str, constant: str, default: Any) -> Any:
    """What a method's own test file says in a constant, where its method differs from the rest."""
    path = Path(__file__).parent / "methods" / f"test_{name}.py"
    if not path.exists():
        return default
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            return ast.literal_eval(node.value)
    return default


def least_change(name: str, model: str, group: str = "") -> float:
    """The share of the largest output that random steps move at least: 1 %, or the `LEAST_CHANGE` of
    the method's test file, by the name of a model or of a group of models; 0: they cannot."""
    shares = stated(name, "LEAST_CHANGE", {})
    return shares.get(model, shares.get(group, 0.01))


def turn(*names: str) -> int:
    """A number that depends on names alone: what is drawn by it stays when others are added."""
    return zlib.crc32(" ".join(names).encode())


def start(base: peftfx.Program, name: str) -> tuple[peftfx.Program, str]:
    """The program that a recipe's last pass is run on, and that pass as text."""
    *before, last = peftfx.parse(RECIPES[name])
    return (peftfx.run(base, before) if before else base), str(last)


def stacked(captured: Any, base: str, names: Sequence[str]) -> list[peftfx.Program]:
    """Programs that hold all methods together: one that does not stack begins another program.

    Args:
        captured: the fixture, or what else places a method on a base by name.
    """
    programs: list[peftfx.Program] = []
    for name in names:
        try:
            below = programs[-1] if programs else captured[base][1]
            programs[-1:] = [peftfx.run(below, RECIPES[name])]
        except RewriteError:
            programs.append(captured.placed(base, name))
    assert {adapter for program in programs for adapter in program.adapters} >= set(names)
    return programs
