"""The rooms of `rewriter/`, read from its imports, and their picture: `python -m tests.rooms`.

The picture is a table: who imports (rows), from whom (columns), with the number of imports. Since no
import goes up, everything lies below the diagonal.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "rewriter"
PICTURE = ROOT / "docs" / "rooms.svg"

ROOMS = (
    "errors",
    "products",
    "parts",
    "branches",
    "graph",
    "inputs",
    "files",
    "program",
    "axes",
    "measure",
    "tracing",
    "sites",
    "weights",
    "edits/calls",
    "edits/linear",
    "edits/attention",
    "edits/prompts",
    "edits/stream",
    "edits/structure",
    "edits/folding",
    "edits",
    "pipeline",
    "verify",
    "scores",
    "run",
    "training",
    "api",
    "capture",
    "blocks",
    "storage",
    "distributed",
)
"""From the bottom up; ARCHITECTURE.md says what each holds."""

FILES = {path.relative_to(HOUSE).with_suffix("").as_posix(): path for path in HOUSE.rglob("*.py")}


def room(name: str) -> str:
    """The room of a file, given as `edits/linear/compose`."""
    return name.rpartition("/")[0] or name


def imports(name: str) -> Iterator[str]:
    """The files of the house that a file imports, in functions and for type hints, too."""
    parts = ("rewriter", *name.split("/"))
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        module = (*parts[: -node.level], *(node.module or "").split("."))
        target = "/".join(p for p in module[1:] if p)
        for alias in node.names:
            inner = f"{target}/{alias.name}".lstrip("/")
            yield inner if inner in FILES else target


IMPORTS: Mapping[str, set[str]] = {n: {i for i in imports(n) if i != n} for n in FILES}


def lines(name: str) -> int:
    """Lines of all files of a room."""
    return sum(len(p.read_text().splitlines()) for f, p in FILES.items() if room(f) == name)


_CELL, _LEFT, _TOP = 24, 172, 126


def picture() -> str:
    """The table as SVG."""
    arrows = Counter((room(n), room(i)) for n, targets in IMPORTS.items() for i in targets)
    side = _CELL * len(ROOMS)
    width, height = _LEFT + side + 56, _TOP + side + 16
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, name in enumerate(ROOMS):
        y, x = _TOP + index * _CELL, _LEFT + index * _CELL
        shade = "#f4f4f4" if index % 2 else "white"
        body.append(f'<rect x="{_LEFT}" y="{y}" width="{side}" height="{_CELL}" fill="{shade}"/>')
        body.append(f'<text x="8" y="{y + 16}">{escape(name)}</text>')
        body.append(
            f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end" fill="#777">{lines(name)}</text>'
        )
        middle = x + _CELL / 2 + 4
        body.append(
            f'<text transform="translate({middle} {_TOP - 8}) rotate(-60)">{escape(name)}</text>'
        )
    most = max(n for (a, b), n in arrows.items() if a != b)
    for (importer, imported), count in sorted(arrows.items()):
        x = _LEFT + ROOMS.index(imported) * _CELL
        y = _TOP + ROOMS.index(importer) * _CELL
        own = importer == imported
        depth = 0.15 + 0.75 * min(1.0, count / most)
        fill = "#bbb" if own else f"rgba(31,92,153,{depth:.2f})"
        ink = "#fff" if depth > 0.5 and not own else "#222"
        body.append(
            f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_CELL - 2}" rx="3" '
            f'fill="{fill}"/>'
        )
        body.append(
            f'<text x="{x + _CELL / 2}" y="{y + 16}" text-anchor="middle" font-size="10" '
            f'fill="{ink}">{count}</text>'
        )
    body.append(f'<text x="8" y="{_TOP - 8}" fill="#777">imports of (lines)</text>')
    return "\n".join([*body, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
