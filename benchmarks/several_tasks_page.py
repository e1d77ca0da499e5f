"""The page of `benchmarks/several_tasks.py`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftfx.demo.evaluation import paired_bootstrap

PAGE = Path(__file__).parent.parent / "docs" / "several-tasks.md"
ABOUT = """\
# What methods for several tasks are for

The texts, and MiniLM with its head, are those of [learning.md](learning.md). Three domains are
known, {new} are new. The head is a logistic regression on the untouched encodings of the known
domains' texts (512 each) and stays as it is: rows differ in what is inside the model alone, which
is a bottleneck of 16 at every feed-forward block, or a prompt of 10 tokens. Budget:
{task}.
One training a row, with rates from learning.md; nothing was chosen here. Accuracy of the sign in %
on 400 held-out texts a domain; differences in points with paired bootstrap intervals
(95 %, over texts: they say nothing of other seeds, or of other examples).

## Known domains, and the new one without examples

`an adapter a domain` is judged on the new domain by the mean of the three. HyperFormer's task
embedding of the new domain is the mean of the others'; PHA takes the known domain whose prototype
is nearest to 16 texts. `three starts`: adapters that began from values of their own.

{known}

## With examples of the new domain

All go on with the same examples, from what the table above has learnt of the known domains; `a new
adapter` has learnt nothing of these. AdapterFusion trains on the examples alone, its members
frozen, HyperFormer all that generates.

{further}

{told}
{absent}

A row takes 6 to 100 CPU seconds (2 cores, busy). Made by `python -m benchmarks.several_tasks DATA`
on {machine}; it goes on where it was stopped.
"""
TOLD = """\
Most of this shows no difference. The head takes nearly all that is to be had in so few steps: one
adapter for all adds less than a point to it, so that what fuses or merges adapters has little to
work with, and ends where that one does. MerA moves nine of ten units of adapters from three starts
to other places, and scores as their plain mean does. Above one adapter for all are HyperFormer on
the known domains and, on the new one, PHA, which chose the task of the movies; but HyperFormer
learns at three times the rate here, and PHA has adapters of another kind, so it need not be the
sharing. With 64 and 256 examples, some of what goes on from known domains is up to two points above
a new adapter (PHA, which was before, and TPT's start with 64, more), and MerA and AdapterSoup are
not clearly above one adapter for all; with 16, nothing is clearly above a new adapter but PHA.
Prompts hold a point less of the known domains. The start that TPT chooses by neurons is 3.6 and 3.7
points above a new prompt with 16 and 64 examples and no better with 256; the one that SPoT chooses
by likeness is 1.3 above, 0.6 below and 0.7 above. One interval in twenty leaves out 0 by chance,
and there are some fifty.
"""


def page(
    figures: Mapping[str, Any], names: Sequence[str], known: Sequence[str], further: Sequence[str]
) -> str:
    """Writes it, and returns it.

    Args:
        figures: what the benchmark keeps.
        names: of the domains, the new one last.
        known: all rows of the first table; those that are not there are named.
        further: of the second.
    """
    absent = [n for n in known if n not in figures["known"]]
    absent += [n for n in further if any(n not in rows for rows in figures["few"].values())]
    told = f"Rows not computed yet: {'; '.join(dict.fromkeys(absent))}." if absent else ""
    text = ABOUT.format(
        known=known_table(figures["known"], names), further=further_table(figures["few"]),
        task=figures["task"], machine=figures["machine"], new=names[-1],
        told=TOLD.strip(), absent="\n".join(textwrap.wrap(told, 100)),
    )  # fmt: skip
    text = text.replace("\n\n\n", "\n\n")
    PAGE.write_text(text, encoding="utf-8")
    return text


def shares(rows: Mapping[str, list[str]]) -> dict[str, list[np.ndarray]]:
    """Of rows of digits, a digit a text."""
    return {n: [np.asarray([int(c) / 3 for c in d]) for d in each] for n, each in rows.items()}


def means(row: list[str]) -> str:
    return " ".join(accuracy(d) for d in shares({"": row})[""])


def accuracy(right: np.ndarray) -> str:
    return f"{100 * right.mean():.1f}"


def gain(right: np.ndarray, over: np.ndarray) -> str:
    """In points, with its interval; empty for the row itself."""
    if right is over:
        return ""
    found = paired_bootstrap(right, over)
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def known_table(rows: Mapping[str, list[str]], names: Sequence[str]) -> str:
    known = {n: [*d[:3], np.concatenate(d[:3]), d[3]] for n, d in shares(rows).items()}
    first = known["one adapter for all"]
    lines = [
        f"| learnt | {' | '.join(names[:3])} | all three | over one for all | {names[3]} (new) | "
        "over one for all |",
        f"|{'---|' * 8}",
    ]
    for name, row in known.items():
        cells = [accuracy(s) for s in row]
        cells.insert(4, gain(row[3], first[3]))
        lines.append(f"| {name} | {' | '.join(cells)} | {gain(row[4], first[4])} |")
    return "\n".join(lines)


def further_table(few: Mapping[str, Mapping[str, list[str]]]) -> str:
    found = {n: {name: row[0] for name, row in shares(few[n]).items()} for n in few}
    lines = [
        f"| goes on from | {' | '.join(f'{n} | over a new adapter' for n in few)} |",
        f"|{'---|' * (1 + 2 * len(few))}",
    ]
    for name in (n for n in next(iter(found.values())) if all(n in f for f in found.values())):
        cells = [
            f"{accuracy(rows[name])} | {gain(rows[name], rows['a new adapter'])}"
            for rows in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
