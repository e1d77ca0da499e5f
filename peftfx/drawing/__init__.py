"""Draws a program's sites, so that a person who does not know the model can choose among them.

    peftfx.draw_sites(program, "model.svg", where="(q|v) and layer>=2")

`regions` finds where each site stands and `repeats` what can be drawn once (both in terms of
`parts`), `boxes` and `layout` turn that into shapes, `canvas` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..rewriter.api import Program
from ..rewriter.errors import OptionError
from ..rewriter.files.files import write_file
from ..rewriter.program.sites import Site
from .boxes import (
    BODY,
    EDGE,
    FAMILIES,
    HIT_EDGE,
    HIT_FILL,
    HIT_INK,
    INK,
    MUTED,
    PAPER,
    SMALL,
    family,
    tick,
)
from .canvas import Canvas, Rect, shorten
from .layout import Painter, plus
from .parts import site_weight
from .regions import streams
from .repeats import compress

MARGIN = 28.0
COLUMNS = 4
"""Most streams side by side."""


def draw_sites(program: Program, path: str | Path, where: str | None = None) -> int:
    """Writes a drawing of the captured model's sites as SVG or PNG, by the path's suffix.

    Args:
        program: its base model is drawn, without adapters.
        path: a file name that ends in `.svg` or `.png`.
        where: a selector; the sites that it matches stand out.

    Returns:
        The number of sites that the selector matches (of all sites without one).

    Raises:
        OptionError: another suffix.
        SelectorError: the selector is malformed or matches nothing.
        ExportError: a PNG is asked for without Pillow, or would be too large.
        ArtifactError: the file cannot be written.
    """
    vector = check_drawing(path) == ".svg"
    base = program.base
    chosen = base.sites.select(where) if where else list(base.sites)
    canvas = picture(base, where, chosen)
    title = f"Sites of {type(base.module).__name__}"
    write_file(path, canvas.svg(title, PAPER) if vector else canvas.png(PAPER))
    return len(chosen)


def check_drawing(path: str | Path) -> str:
    """The suffix of a drawing's file name.

    Raises:
        OptionError: it is neither `.svg` nor `.png`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise OptionError(f"{path}: a drawing's name ends in .svg or .png.")
    return suffix


def picture(base: Program, where: str | None, chosen: list[Site]) -> Canvas:
    """The whole drawing on one canvas."""
    hits = frozenset(s.id for s in chosen) if where else None
    painter = Painter(hits)
    lanes, outside = streams(base, hits or frozenset())
    columns: list[Canvas] = []
    for stream in lanes:
        stream.layers = compress(stream.layers, hits or frozenset())
        count = sum(len(layer.numbers) for layer in stream.layers)
        about = "1 layer" if count == 1 else f"{count} layers"
        columns.append(_titled(f"stream {stream.name}", painter.stream(stream), about))
    for index, drawn in enumerate(painter.chain(outside)):
        name = "outside of the streams" if lanes else "sites in the order of the graph"
        columns.append(_titled(name if not index else f"{name}, continued", drawn))
    canvas = _heading(base, where, chosen)
    y = canvas.height + 18
    for at in range(0, len(columns), COLUMNS):
        x, height = MARGIN, 0.0
        for column in columns[at : at + COLUMNS]:
            canvas.paste(column, x, y)
            x += column.width + 44
            height = max(height, column.height)
        y += height + 30
    canvas.width += MARGIN
    canvas.height += MARGIN
    return canvas


def _titled(title: str, body: Canvas, about: str = "") -> Canvas:
    canvas = Canvas()
    end = canvas.write(0, 13, title, 14, INK, True)
    canvas.width = canvas.write(end + 8, 13, about, BODY, MUTED)
    return canvas.paste(body, 0, 24)


def _heading(base: Program, where: str | None, chosen: list[Site]) -> Canvas:
    canvas = Canvas()
    total = sum(p.numel() for p in base.module.parameters())
    end = canvas.write(
        MARGIN, 44, shorten(type(base.module).__name__, 700, 20, True), 20, INK, True
    )
    if where:
        count = parameters(base, chosen)
        text = f"where={shorten(where, 420, 13)} hits {len(chosen)} of {len(base.sites)} sites"
        if count:
            share = 100 * count / total
            text += f"; their weights hold {count:,} of {total:,} parameters ({share:.1f} %)"
    else:
        text = f"{len(base.sites)} sites, {total:,} parameters"
    end = max(end, canvas.write(MARGIN, 68, text, 13, INK))
    used = {family(s) for s in base.sites}
    canvas.width = max(end, _legend(canvas, [] if where else [f for f in FAMILIES if f in used]))
    canvas.height = 104
    return canvas


def _legend(canvas: Canvas, families: Sequence[str]) -> float:
    """Explains colours (or the mark, if no families are given) and symbols; returns its end."""
    x, y = MARGIN, 93.0
    for name in families:
        canvas.add(Rect(x, y - 11, 20, 14, *FAMILIES[name], 1.2, 3))
        x = canvas.write(x + 27, y, name, SMALL, MUTED) + 20
    if not families:
        canvas.add(Rect(x, y - 11, 20, 14, HIT_FILL, HIT_EDGE, 2, 3))
        tick(canvas, x + 19, y - 11)
        x = canvas.write(x + 33, y, "hit by the selector", SMALL, HIT_INK) + 20
    canvas.add(Rect(x, y - 11, 24, 14, PAPER, EDGE, 1.2, 7))
    x = canvas.write(x + 31, y, "no weights", SMALL, MUTED) + 20
    canvas.add(*plus(x + 8, y - 4))
    x = canvas.write(x + 23, y, "joins the residual stream", SMALL, MUTED) + 20
    return canvas.write(x, y, "bold words are what a selector can say", SMALL, MUTED)


def parameters(program: Program, chosen: Sequence[Site]) -> int:
    """Number of parameters in the weights of sites, each feature counted once."""
    count = {n: p.numel() for n, p in program.module.named_parameters()}
    whole: set[str] = set()
    parts: dict[str, dict[int, int]] = {}  # weight -> feature -> its number of parameters
    for site in chosen:
        features = getattr(site, "features", None)
        if features is None:
            whole.add(site_weight(site))
        else:
            each = getattr(site, "in_features", 0) * getattr(site, "experts", 1)
            parts.setdefault(site_weight(site), {}).update(dict.fromkeys(features, each))
    total = sum(count[w] for w in whole if w in count)
    return total + sum(sum(f.values()) for w, f in parts.items() if w not in whole)


__all__ = ["check_drawing", "draw_sites", "picture"]
