"""Tables of numbers as colours: layers down, kinds of places across."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..comparison import Comparison
from ..rewriter.files.files import write_file
from . import check_drawing
from .boxes import BODY, FAINT, INK, MUTED, PAPER, SMALL
from .canvas import Canvas, Rect, text_width
from .places import kinds_of, layer_of

MARGIN, GAP = 28.0, 40.0
_CELL = (58.0, 20.0)

_BLUE, _WHITE, _RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


@dataclass(frozen=True)
class Heat:
    """One table.

    Attributes:
        title, about: above it.
        values: (row, column) -> number; others are left empty.
        color: number -> from -1 (blue) over 0 (white) to 1 (red).
        text: number -> what stands in its cell.
    """

    title: str
    about: str
    values: Mapping[tuple[str, str], float]
    color: Callable[[float], float]
    text: Callable[[float], str]


def draw_comparison(path: str | Path, names: Sequence[str], found: Comparison) -> None:
    """Draws, for each pair of adapters, cosines and sign conflicts, and for each adapter the norms.

    Args:
        path: a file name that ends in `.svg` or `.png`.
        names: of the adapters.
        found: their comparison.

    Raises:
        OptionError: another suffix. ExportError: see `draw_sites`.
        ArtifactError: the file cannot be written.
    """
    vector = check_drawing(path) == ".svg"
    canvas = picture(names, found)
    title = f"Comparison of {', '.join(names)}"
    write_file(path, canvas.svg(title, PAPER) if vector else canvas.png(PAPER))


def picture(names: Sequence[str], found: Comparison) -> Canvas:
    """The whole drawing: a row of tables a pair, and one with the norms."""
    rows = list(dict.fromkeys(_row(p) for p in found.norms))
    rows.sort(key=lambda r: (not r.isdigit(), int(r) if r.isdigit() else 0))
    kinds = kinds_of(found.norms)
    columns = list(dict.fromkeys(kinds.values()))
    canvas = Canvas()
    canvas.width = canvas.write(MARGIN, 44, "Changes by layer and place", 20, INK, True)
    about = "red: alike, or large; blue: opposed; empty: not changed by both, or not known"
    canvas.width = max(canvas.width, canvas.write(MARGIN, 66, about, SMALL, MUTED))
    y = 92.0
    cells = {place: (_row(place), kind) for place, kind in kinds.items()}
    for tables in _tables(names, found, cells):
        x, height = MARGIN, 0.0
        for table in tables:
            drawn = _draw(table, rows, columns)
            canvas.paste(drawn, x, y)
            x += drawn.width + GAP
            height = max(height, drawn.height)
        y += height + GAP
    canvas.width += MARGIN
    canvas.height = y
    return canvas


def draw_shares(path: str | Path, shares: Mapping[str, Sequence[float]]) -> None:
    """Draws what a fold left of each change: the share that survives, and that along its direction.

    Args:
        path: a file name that ends in `.svg` or `.png`.
        shares: by weight, (along its own direction, errors relative to the size of the change).

    Raises:
        OptionError: another suffix. ExportError: see `draw_sites`.
        ArtifactError: the file cannot be written.
    """
    vector = check_drawing(path) == ".svg"
    kinds = kinds_of(shares)
    cells = {place: (_row(place), kind) for place, kind in kinds.items()}
    rows = sorted({r for r, _ in cells.values()}, key=lambda r: int(r) if r.isdigit() else -1)
    columns = list(dict.fromkeys(kinds.values()))
    canvas = Canvas()
    end = canvas.write(MARGIN, 44, "What rounding left of what was learnt", 20, INK, True)
    about = "blue: all of it; white: half; red: nothing. By layer and place; empty: not changed."
    canvas.width = max(end, canvas.write(MARGIN, 66, about, SMALL, MUTED))
    survives = {cells[p]: max(0.0, 1 - lost) for p, (_, lost) in shares.items()}
    along = {cells[p]: left for p, (left, _) in shares.items()}
    about = "without what is gone or drowned in errors"
    x = MARGIN
    for table in (
        Heat("survives", about, survives, lambda v: 1 - 2 * v, lambda v: f"{v:.1%}"),
        Heat("along its direction", "errors may be beside it", along, lambda v: 1 - 2 * v,
             lambda v: f"{v:.1%}"),
    ):  # fmt: skip
        drawn = _draw(table, rows, columns)
        canvas.paste(drawn, x, 92.0)
        x += drawn.width + GAP
    canvas.width += MARGIN
    canvas.height += MARGIN
    title = "What rounding left of what was learnt"
    write_file(path, canvas.svg(title, PAPER) if vector else canvas.png(PAPER))


def _tables(
    names: Sequence[str], found: Comparison, cells: Mapping[str, tuple[str, str]]
) -> list[list[Heat]]:
    tables: list[list[Heat]] = []
    for (one, two), places in found.likeness.items():
        about = f"{names[one]}, {names[two]}"
        cosines = {cells[p]: like.cosine for p, like in places.items()}
        conflicts = {cells[p]: like.conflict for p, like in places.items()}
        tables.append([
            Heat("cosine", about, cosines, lambda v: v, _hundredths),
            Heat("sign conflicts", about, conflicts, lambda v: 1 - 2 * v, lambda v: f"{v:.0%}"),
        ])  # fmt: skip
    largest = max((n for norms in found.norms.values() for n in norms if n), default=1.0)
    tables.append([
        Heat("norm of the change", name,
             {cells[p]: n for p, norms in found.norms.items() if (n := norms[index]) is not None},
             lambda v: v / largest, lambda v: f"{v:.3g}")
        for index, name in enumerate(names)
    ])  # fmt: skip
    return tables


def _hundredths(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def _row(place: str) -> str:
    layer = layer_of(place)
    return "-" if layer is None else str(layer)


def _draw(table: Heat, rows: Sequence[str], columns: Sequence[str]) -> Canvas:
    canvas = Canvas()
    end = canvas.write(0, 14, table.title, 14, INK, True)
    end = max(end, canvas.write(0, 32, table.about, BODY, MUTED))
    wide = [max(_CELL[0], text_width(c, SMALL) + 12) for c in columns]
    left = max(text_width(f"layer {r}", SMALL) for r in rows) + 10
    x = left
    for column, width in zip(columns, wide, strict=True):
        canvas.write(x + (width - text_width(column, SMALL)) / 2, 54, column, SMALL, MUTED)
        x += width
    for index, row in enumerate(rows):
        y = 62 + index * _CELL[1]
        said = f"layer {row}" if row != "-" else "-"
        canvas.write(0, y + 14, said, SMALL, MUTED)
        x = left
        for column, width in zip(columns, wide, strict=True):
            _value(canvas, table, (row, column), x, y, width)
            x += width
    canvas.width, canvas.height = max(end, x), 62 + len(rows) * _CELL[1]
    return canvas


def _value(
    canvas: Canvas, table: Heat, cell: tuple[str, str], x: float, y: float, width: float
) -> None:
    number = table.values.get(cell)
    if number is None or math.isnan(number):
        canvas.add(Rect(x + 1, y + 1, width - 2, _CELL[1] - 2, PAPER, FAINT, 1, 2))
        return
    depth = max(-1.0, min(1.0, table.color(number)))
    text = table.text(number)
    title = f"layer {cell[0]}, {cell[1]}: {number:.4g}"
    canvas.add(Rect(x + 1, y + 1, width - 2, _CELL[1] - 2, _shade(depth), "none", 1, 2, title))
    ink = PAPER if abs(depth) > 0.6 else INK
    canvas.write(x + (width - text_width(text, SMALL)) / 2, y + 14, text, SMALL, ink)


def _shade(depth: float) -> str:
    end = _RED if depth > 0 else _BLUE
    mixed = (round(w + (e - w) * abs(depth)) for w, e in zip(_WHITE, end, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)
