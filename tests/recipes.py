"""Every pass's small recipe: the first line of its golden text, `# lora{rank=2}`.

A recipe may have several passes; the last one is the pass in question.
"""

from __future__ import annotations

from pathlib import Path

import peftfx
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

GOLDEN = Path(__file__).parent / "golden"


def recipe_of(name: str) -> str:
    """The small recipe of a pass; its bare name until it has a golden text."""
    path = GOLDEN / f"{name}.txt"
    return path.read_text().splitlines()[0].removeprefix("# ") if path.exists() else name


RECIPES = {name: recipe_of(name) for name in sorted(REGISTRY)}
FAINT = {"adapter_fusion": 0.005}
"""Share of the largest output that random steps move, where it is not 1 %: what is fused is frozen
near its small initial values."""
METHODS = tuple(sorted(n for n, cls in REGISTRY.items() if issubclass(cls, Method)))


def method_class(name: str) -> type[Method]:
    """The class of a method."""
    found = REGISTRY[name]
    if not issubclass(found, Method):
        raise TypeError(name)
    return found


def start(base: peftfx.Program, name: str) -> tuple[peftfx.Program, str]:
    """The program that a recipe's last pass is run on, and that pass as text."""
    *before, last = peftfx.parse(RECIPES[name])
    return (peftfx.run(base, before) if before else base), str(last)
