"""Compare adapters of one base: cosines, norms and sign conflicts of their changes.

The cosine is of all elements of two changes; a sign conflict is an element that both change in
opposite directions, in percent of those that both change. `--draw` makes a table of colours.

JSON: `{adapters, pairs, norms, unknown}`; a pair is `{adapters, cosine, sign_conflicts, norms,
places}`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..comparison import Comparison, Likeness, compare
from ..drawing import check_drawing
from ..drawing.heat import draw_comparison
from ..exporters.adapter_changes import Described, describe
from ..exporters.base import checkpoint
from ..exporters.formats import format_of
from ..outputs import check_file
from ..rewriter.errors import OptionError
from ..terminal import progress, say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    about = "two or more, of any formats that are read; no model is needed"
    parser.add_argument("adapters", nargs="+", metavar="adapter", help=about)
    about = "the directory of their model, whose files are read where changes depend on them"
    parser.add_argument("--base", metavar="DIR", help=about)
    about = "draw cosines, conflicts and norms, too: a name in .svg or .png"
    parser.add_argument("--draw", metavar="FILE", help=about)


def command(options: Any) -> Any:
    """Runs the command."""
    if len(options.adapters) < 2:
        raise OptionError("compare takes two adapters or more. Give another one.")
    if options.draw:
        check_drawing(options.draw)
        check_file(options.draw)
    for path in options.adapters:
        format_of(path)
    base = checkpoint(options.base) if options.base else None
    with progress(options, "reading the adapters"):
        adapters = [describe(path, base) for path in options.adapters]
    with progress(options, "comparing their changes"):
        found = compare(adapters)
    names = short_names(options.adapters)
    for name, adapter in zip(names, adapters, strict=True):
        methods = ", ".join(adapter.methods)
        say(options, f"{name}: {adapter.path}, {methods}, {len(adapter.places)} places")
    say(options, "")
    _pairs(options, names, found)
    say(options, "")
    _places(options, names, found)
    for place, why in found.unknown.items():
        say(options, f"{place}: not compared: {why}")
    if options.draw:
        draw_comparison(options.draw, names, found)
        say(options, f"drawn to {options.draw}")
    return _json(adapters, found)


def short_names(paths: list[str]) -> list[str]:
    """What to call adapters: the ends of their paths, as long as it takes to tell them apart."""
    parts = [Path(p).absolute().parts for p in paths]
    depth = next((d for d in (1, 2, 3) if len({p[-d:] for p in parts}) == len(paths)), 0)
    if not depth:
        return [f"{i} {Path(p).name}" for i, p in enumerate(paths, 1)]
    return ["/".join(p[-depth:]) for p in parts]


def _pairs(options: Any, names: list[str], found: Comparison) -> None:
    head = ("adapters", "places", "cosine", "sign conflicts")
    rows = [
        (f"{names[i]}, {names[j]}", str(len(places)), *_cells(found.total((i, j))))
        for (i, j), places in found.likeness.items()
    ]
    say_table(options, head, rows, head[1:])


def _cells(like: Likeness) -> tuple[str, str]:
    conflict = "-" if math.isnan(like.conflict) else f"{like.conflict:.1%}"
    return "-" if math.isnan(like.cosine) else f"{like.cosine:.3f}", conflict


def _places(options: Any, names: list[str], found: Comparison) -> None:
    """Norms by place; of two adapters how alike they are, too."""
    head = ["place", *(f"norm {name}" for name in names)]
    pair = (0, 1) if len(names) == 2 else None
    rows: list[list[str]] = []
    for place, norms in found.norms.items():
        row = [place, *("-" if n is None else f"{n:.4g}" for n in norms)]
        if pair:
            like = found.likeness[pair].get(place)
            row += _cells(like) if like else ("-", "-")
        rows.append(row)
    head += ["cosine", "sign conflicts"] if pair else []
    say_table(options, head, rows, head[1:])


def _json(adapters: list[Described], found: Comparison) -> dict[str, Any]:
    return {
        "adapters": [a.path for a in adapters],
        "pairs": [
            {
                "adapters": pair, **_like(found.total(pair)),
                "places": {name: _like(like) for name, like in places.items()},
            }
            for pair, places in found.likeness.items()
        ],
        "norms": dict(found.norms),
        "unknown": dict(found.unknown),
    }  # fmt: skip


def _like(like: Likeness) -> dict[str, Any]:
    def finite(number: float) -> float | None:
        return None if math.isnan(number) else number

    return {"cosine": finite(like.cosine), "sign_conflicts": finite(like.conflict),
            "norms": like.norms}  # fmt: skip
