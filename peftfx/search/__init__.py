"""Searches for configurations of adapters: which layers, which kinds, how large.

    space = Space.of(program, rest="train{where=head}")
    found = search(program, space, evaluate, trials=100, storage="search.db", patience=30)
    found.draw("front.svg")
    program = peftfx.run(program, found.best(parameters=200_000).recipe)

`evaluate(program)` trains and scores a program as its caller likes (larger is better). The same
call again, also in other processes or on other machines with one storage, goes on where it was.
`staged` is the greedy search in stages over groups of layers. Needs optuna: `peftfx[search]`.
"""

from __future__ import annotations

from .front import Found, Trial, front_of, volume
from .plot import draw_fronts
from .space import Space
from .stages import Staged, staged
from .study import search

__all__ = [
    "Found",
    "Space",
    "Staged",
    "Trial",
    "draw_fronts",
    "front_of",
    "search",
    "staged",
    "volume",
]
