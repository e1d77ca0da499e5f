"""Every pair of methods on one model: whether they compose, in which order, or why not.

python -m tests.stacks          # runs the pairs that docs/stacks.md lacks (of a new method) and adds them
python -m tests.stacks lora     # the pairs of these methods afresh; --all: every pair

What becomes of a pair follows from the slots that its methods fill, so that the tests take as many
pairs as it takes for every two slots to meet, and a few others, drawn by the seed of the run
(`chosen`); `pytest --stacks` takes all.
"""

from __future__ import annotations

import functools
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product
from pathlib import Path

import torch

import peftfx
from peftfx.rewriter.errors import RewriteError

from . import models
from .captures import captures
from .recipes import METHODS, RECIPES, turn

PAGE = Path(__file__).parents[1] / "docs" / "stacks.md"
PAIRS = tuple(combinations_with_replacement(METHODS, 2))
MODEL = "block"
DRAWN = 6
"""Of the pairs whose slots meet in others, in each run."""
Placed = Callable[[str], peftfx.Program]
"""The model with one method's recipe."""


def randomised(program: peftfx.Program) -> peftfx.Program:
    """Moves what trains by noise that depends on its name alone, so that orders can be compared."""
    with torch.no_grad():
        for name, parameter in program.named_trainable_parameters().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return program


@dataclass(frozen=True)
class Stack:
    """What became of two methods on one model.

    Attributes:
        programs: the orders that work, first-then-second before second-then-first.
        errors: the messages of those that do not.
        gap: largest difference between the outputs of the two orders, relative to the largest.
    """

    programs: tuple[peftfx.Program, ...]
    errors: tuple[str, ...]
    gap: float

    @property
    def cell(self) -> str:
        """`either order`, `order matters`, `only a, then b`, or the reason of the refusal."""
        if not self.programs:
            return re.split(r"(?<=[a-z)])[.;] ", self.errors[0])[0].rstrip(".")
        if self.errors:
            first, second = self.programs[0].adapters[0], self.programs[0].adapters[-1]
            return f"only {first}, then {second}"
        return "either order" if self.gap < 1e-5 else "order matters"


def slots(program: peftfx.Program) -> frozenset[str]:
    """What a method fills: kinds of sites and their slots, stored tensors, and inputs of its own."""
    found = {f"{program.sites[a.site].kind} {a.slot}" for a in program.attachments}
    found |= {"stored" for owned in program.owned.values() if owned}
    found |= {"integers" for t in program.module.state_dict().values() if t.dtype == torch.uint8}
    return frozenset(found | {"input" for i in program.spec.inputs if i.optional})


def chosen(filled: Mapping[str, frozenset[str]], seed: int) -> set[tuple[str, str]]:
    """Pairs in which every two slots meet, one after the other, and `DRAWN` of the rest.

    Args:
        filled: the slots of each method.
        seed: of the run; other pairs are drawn by another.
    """
    meeting = {p: {frozenset(two) for two in product(filled[p[0]], filled[p[1]])} for p in PAIRS}
    apart = set[frozenset[str]]().union(*meeting.values())
    pairs: set[tuple[str, str]] = set()
    while apart:
        pair = max(PAIRS, key=lambda p: (len(meeting[p] & apart), turn(*p)))
        pairs.add(pair)
        apart -= meeting[pair]
    others = sorted(set(PAIRS) - pairs, key=lambda p: turn(str(seed), *p))
    return pairs | set(others[:DRAWN])


def added(first: str, second: str) -> list[peftfx.Pass]:
    """The passes of the second method's small recipe; of one method, with a name of its own."""
    passes = list(peftfx.parse(RECIPES[second]))
    if first == second:
        passes = [replace(passes[-1], name=f"{second}_2")]  # pyright: ignore[reportCallIssue]
    return passes


def stack(placed: Placed, first: str, second: str) -> Stack:
    """Runs two methods in both orders (in one, if they are the same)."""
    programs: list[peftfx.Program] = []
    errors: list[str] = []
    for a, b in dict.fromkeys([(first, second), (second, first)]):
        try:
            programs.append(randomised(peftfx.run(placed(a), added(a, b))))
        except RewriteError as error:
            errors.append(str(error))
    outs = [models.first(p(**models.batch())).detach() for p in programs]
    gap = models.moved(outs[0], outs[1]) if len(outs) == 2 else 0.0
    return Stack(tuple(programs), tuple(errors), gap)


def render(cells: dict[tuple[str, str], str]) -> str:
    """The page for the given cells."""
    cells = {pair: cell for pair, cell in cells.items() if pair in PAIRS}
    marks = {"either order": "=", "order matters": "<>"}
    others = sorted({c for c in cells.values() if c not in marks})
    lines = [
        "# Stacks", "",
        "Every pair of methods on one decoder, at their usual places. `=`: they compose, and the "
        "order of the", "passes changes nothing. `<>`: they compose, and the order is a choice: the "
        "later pass acts on what the", "earlier one left. A number: see below. Two of one method "
        "have two names. Generated by", "`python -m tests.stacks`; `tests/test_stacks.py` checks "
        "every cell, that what folds still folds, and that", "the stack survives saving and "
        "loading.", "",
        f"| | {' | '.join(METHODS)} |", f"|{'---|' * (len(METHODS) + 1)}",
    ]  # fmt: skip
    for row, first in enumerate(METHODS):
        shown: list[str] = []
        for second in METHODS[: row + 1]:
            cell = cells.get((second, first), "")
            shown.append(f"[^{others.index(cell) + 1}]" if cell in others else marks.get(cell, ""))
        lines.append(f"| {first} | {' | '.join(shown + [''] * (len(METHODS) - row - 1))} |")
    lines.append("")
    lines += [f"[^{index}]: {reason}." for index, reason in enumerate(others, 1)]
    lines += ["", _RULES]
    return "\n".join(lines) + "\n"


_RULES = """At one linear the order is fixed, whatever the order of the passes: input shift (parallel adapters that
join the heads), input scale ((IA)3 at the down
projection), the weight (with expressions such as learnt masks and quantised codes), row scale (DoRA,
with its own low-rank part), the other low-rank parts, output scale. Serial branches stand one behind
the other in the order of the passes, and so do expressions of one weight."""


def read(text: str) -> dict[tuple[str, str], str]:
    """The cells of a page, by the page's own columns."""
    words = {"=": "either order", "<>": "order matters"}
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)\.$", text, re.MULTILINE))
    table = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    cells: dict[tuple[str, str], str] = {}
    for first, *rest in rows[2:]:
        for second, cell in zip(rows[0][1:], rest, strict=False):
            if cell:
                note = re.fullmatch(r"\[\^(\d+)\]", cell)
                cells[second, first] = notes[note[1]] if note else words[cell]
    return cells


def known() -> dict[tuple[str, str], str]:
    """The cells that the page has."""
    return read(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}


def main(names: Sequence[str]) -> None:
    """Writes the page: the pairs that it lacks, and those of the named methods afresh."""
    torch.set_num_threads(1)
    afresh = set(METHODS) if "--all" in names else set(names)
    if unknown := afresh - set(METHODS):
        raise SystemExit(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    cells = {pair: cell for pair, cell in known().items() if not afresh & set(pair)}
    base = peftfx.capture(models.build(MODEL), kwargs=models.batch(), cache=captures())
    placed = functools.cache(lambda name: peftfx.run(base, RECIPES[name]))
    cells |= {pair: stack(placed, *pair).cell for pair in PAIRS if pair not in cells}
    PAGE.write_text(render(cells), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
