"""A search space: layers that may be tuned, and the sizes that each kind of module may have."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..rewriter.api import Program
from ..rewriter.errors import OptionError, RewriteError
from ..rewriter.pipeline.syntax import parse
from ..rewriter.program.sites import SublayerSite
from ..rewriter.run.run import run


@dataclass(frozen=True)
class Space:
    """The configurations of a pass that takes `layers` and one size for each kind of module.

    Zhou et al. (TACL 2024) have a bit for each layer, and for each kind the width of the model
    divided by a power of 2, or nothing.

    Attributes:
        layers: numbers of the layers that may be tuned or not.
        sizes: option of the pass -> sizes to choose from, in order; 0 is none of that kind.
        rest: passes that every configuration ends with, such as `train{where=head}`.
        method: the pass.

    Raises:
        OptionError: it has no configuration, or the pass has no such option.
    """

    layers: tuple[int, ...]
    sizes: Mapping[str, tuple[int, ...]]
    rest: str = ""
    method: str = "autopeft"

    def __post_init__(self) -> None:
        kinds = {n: s for n, s in self.sizes.items() if any(s)}
        if not self.layers or not kinds:
            what = "layer" if not self.layers else "kind with a size above 0"
            raise OptionError(
                f"the search space is empty: it has no {what}. Give layers=(0, 1, ...) and "
                'sizes={"serial": (0, 16, 64)}, or use Space.of(program).'
            )
        for kind, sizes in self.sizes.items():
            if not sizes or len({*sizes}) < len(sizes) or list(sizes) != sorted(sizes):
                raise OptionError(
                    f"the search space has the sizes {tuple(sizes)} of {kind}. Give different "
                    "numbers in rising order."
                )
        if len({*self.layers}) < len(self.layers):
            raise OptionError(
                f"the search space names a layer twice: {self.layers}. Give each one."
            )
        parse(self.largest(*kinds))

    @classmethod
    def of(
        cls,
        program: Program,
        kinds: Sequence[str] = ("serial", "parallel", "prefix"),
        rest: str = "",
        halvings: int = 10,
    ) -> Space:
        """The space of the paper: all layers, and sizes from the model's width down by halves.

        Raises:
            OptionError: the model has no layers with feed-forward blocks.
        """
        widths = [s.width for s in program.sites if isinstance(s, SublayerSite)]
        layers = {s.layer for s in program.sites if s.layer is not None}
        top = max(widths, default=0)
        sizes = {0, *(top >> k for k in range(halvings + 1))}
        return cls(tuple(sorted(layers)), {k: tuple(sorted(sizes)) for k in kinds}, rest)

    @property
    def count(self) -> int:
        """How many configurations there are, those that tune nothing left out of account."""
        return 2 ** len(self.layers) * math.prod(len(s) for s in self.sizes.values())

    def recipe(self, layers: Sequence[int], sizes: Mapping[str, int]) -> str:
        """A configuration as pipeline text; `rest` alone where it tunes nothing."""
        passes = [self.rest] if self.rest else []
        if layers and any(sizes.values()):
            given = ",".join(f"{kind}={size}" for kind, size in sizes.items())
            chosen = ",".join(str(n) for n in layers)
            passes = [f"{self.method}{{layers=[{chosen}],{given}}}", *passes]
        return ";".join(passes)

    def largest(self, *kinds: str) -> str:
        """The configuration with the largest modules of some kinds in all layers."""
        sizes = {k: max(s) if k in kinds else 0 for k, s in self.sizes.items()}
        return self.recipe(self.layers, sizes)

    def chosen(self, trial: Any) -> str:
        """The configuration that an optuna trial suggests."""
        drawn = {n: trial.suggest_categorical(n, (False, True)) for n in self._bits().values()}
        drawn |= {k: trial.suggest_int(k, 0, len(s) - 1) for k, s in self.sizes.items()}
        return self.text(drawn)

    def drawn(self, source: random.Random) -> dict[str, Any]:
        """What a trial of a random configuration suggests."""
        bits = {n: source.random() < 0.5 for n in self._bits().values()}
        return bits | {k: source.randrange(len(s)) for k, s in self.sizes.items()}

    def text(self, drawn: Mapping[str, Any]) -> str:
        """The configuration of what a trial suggests, as pipeline text."""
        layers = [n for n, bit in self._bits().items() if drawn[bit]]
        return self.recipe(layers, {k: s[drawn[k]] for k, s in self.sizes.items()})

    def _bits(self) -> dict[int, str]:
        return {n: f"layer{n}" for n in self.layers}

    def stated(self) -> dict[str, Any]:
        """As strict JSON, which tells spaces apart."""
        sizes = {k: list(s) for k, s in self.sizes.items()}
        return {"layers": list(self.layers), "sizes": sizes, "rest": self.rest, "pass": self.method}

    def admit(self, program: Program) -> None:
        """Tries the largest modules of each kind, alone and together.

        Raises:
            OptionError: the program refuses a configuration; says which, why, and what to leave.
        """
        for kinds in self._corners():
            try:
                run(program, self.largest(*kinds))
            except RewriteError as error:
                named = " and ".join(kinds)
                raise OptionError(
                    f"the search space holds what this program refuses: {self.largest(*kinds)}. "
                    f"{error} Leave {named} out of sizes, or give them smaller ones."
                ) from error

    def _corners(self) -> Iterator[tuple[str, ...]]:
        kinds = [k for k, s in self.sizes.items() if any(s)]
        yield from ((k,) for k in kinds)
        if len(kinds) > 1:
            yield tuple(kinds)
