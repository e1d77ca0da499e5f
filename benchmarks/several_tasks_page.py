"""The page of `benchmarks/several_tasks.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftfx.demo.evaluation import paired_bootstrap

PAGE = Path(__file__).parent.parent / "docs" / "several-tasks.md"
ABOUT = """\
# What methods for several tasks are for

{known}

{further}
"""


def page(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    """Writes it, and returns it.

    Args:
        figures: what the benchmark keeps.
        names: of the domains, the new one last.
    """
    text = ABOUT.format(
        known=known_table(figures["known"], names), further=further_table(figures["few"]),
        task=figures["task"], machine=figures["machine"], new=names[-1],
    )  # fmt: skip
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
