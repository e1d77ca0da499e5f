"""A picture as a list of shapes, written as SVG text or painted by Pillow.

Every shape knows both forms, so nothing is drawn twice. Text is measured by one table of letter
widths (those of Pillow's built-in face); the SVG states each text's length, so that it fits its
box with whatever sans-serif face the viewer has. Coordinates are pixels, y points down.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Protocol, Self

from ..rewriter.errors import ExportError

Point = tuple[float, float]

SUPERSAMPLE = 2
LARGEST = 120_000_000
"""Most pixels that are painted; larger pictures are not supersampled, then refused."""

# Advance widths of ASCII 32 to 126 in hundredths of the font size.
_WIDTHS = bytes.fromhex(
    "1618223a3a4a41122020383a161b161e3a3a3a3a3a3a3a3a3a3a16163a3a3a3255403f46473b3947491a363d"
    "3a57484a3c493e3a3d443e5f3e3a3b1f1e1e3a321e353d353e371d3e3b18173419563b3b3d3e212e1f3b334e"
    "30332e1e191e3a"
)
_OTHER = {"→": 95, "…": 62, "·": 20}
_BOLD = 1.06


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of one line of text in pixels."""
    hundredths = sum(_WIDTHS[ord(c) - 32] if " " <= c <= "~" else _OTHER.get(c, 100) for c in text)
    return hundredths / 100 * size * (_BOLD if bold else 1.0)


def shorten(text: str, width: float, size: float, bold: bool = False) -> str:
    """`text`, cut from the left (names differ at their ends) until it fits into `width`."""
    if text_width(text, size, bold) <= width:
        return text
    while text and text_width("…" + text, size, bold) > width:
        text = text[1:]
    return "…" + text.lstrip(".")


class Shape(Protocol):
    """Anything on a canvas."""

    def moved(self, dx: float, dy: float) -> Shape: ...

    def svg(self) -> str: ...

    def paint(self, pen: Any, scale: int) -> None: ...


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Rect:
    """A rectangle with round corners; `title` is its tooltip in SVG, `mark` a class there."""

    x: float
    y: float
    w: float
    h: float
    fill: str = "none"
    stroke: str = "none"
    width: float = 1.0
    radius: float = 4.0
    title: str = ""
    mark: str = ""

    def moved(self, dx: float, dy: float) -> Rect:
        return replace(self, x=self.x + dx, y=self.y + dy)

    def svg(self) -> str:
        kind = f' class="{self.mark}"' if self.mark else ""
        body = f"><title>{escape(self.title)}</title></rect>" if self.title else "/>"
        return (
            f'<rect{kind} x="{_n(self.x)}" y="{_n(self.y)}" width="{_n(self.w)}" '
            f'height="{_n(self.h)}" rx="{_n(self.radius)}" fill="{self.fill}" '
            f'stroke="{self.stroke}" stroke-width="{_n(self.width)}"{body}'
        )

    def paint(self, pen: Any, scale: int) -> None:
        corners = [v * scale for v in (self.x, self.y, self.x + self.w, self.y + self.h)]
        pen.rounded_rectangle(
            corners, self.radius * scale, None if self.fill == "none" else self.fill,
            None if self.stroke == "none" else self.stroke, round(self.width * scale),
        )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Straight pieces through `points`, with an arrow head of that length at the end."""

    points: tuple[Point, ...]
    color: str
    width: float = 1.4
    arrow: float = 0.0

    def moved(self, dx: float, dy: float) -> Line:
        return replace(self, points=tuple((x + dx, y + dy) for x, y in self.points))

    def _head(self) -> tuple[Point, Point, Point] | None:
        if not self.arrow:
            return None
        (x0, y0), (x, y) = self.points[-2:]
        length = math.hypot(x - x0, y - y0) or 1.0
        ux, uy = (x - x0) / length, (y - y0) / length
        back, half = (x - self.arrow * ux, y - self.arrow * uy), 0.56 * self.arrow
        return (
            (x, y),
            (back[0] - half * uy, back[1] + half * ux),
            (back[0] + half * uy, back[1] - half * ux),
        )

    def svg(self) -> str:
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in self.points)
        head = self._head()
        tip = " ".join(f"{_n(x)},{_n(y)}" for x, y in head) if head else ""
        return (
            f'<polyline points="{path}" fill="none" stroke="{self.color}" '
            f'stroke-width="{_n(self.width)}" stroke-linejoin="round"/>'
        ) + (f'<polygon points="{tip}" fill="{self.color}"/>' if tip else "")

    def paint(self, pen: Any, scale: int) -> None:
        path = [(x * scale, y * scale) for x, y in self.points]
        pen.line(path, self.color, round(self.width * scale), "curve")
        if head := self._head():
            pen.polygon([(x * scale, y * scale) for x, y in head], self.color)


@dataclass(frozen=True)
class Circle:
    """A disc around (x, y)."""

    x: float
    y: float
    r: float
    fill: str
    stroke: str = "none"
    width: float = 1.4

    def moved(self, dx: float, dy: float) -> Circle:
        return replace(self, x=self.x + dx, y=self.y + dy)

    def svg(self) -> str:
        return (
            f'<circle cx="{_n(self.x)}" cy="{_n(self.y)}" r="{_n(self.r)}" fill="{self.fill}" '
            f'stroke="{self.stroke}" stroke-width="{_n(self.width)}"/>'
        )

    def paint(self, pen: Any, scale: int) -> None:
        box = [
            v * scale for v in (self.x - self.r, self.y - self.r, self.x + self.r, self.y + self.r)
        ]
        stroke = None if self.stroke == "none" else self.stroke
        pen.ellipse(box, self.fill, stroke, round(self.width * scale))


@dataclass(frozen=True)
class Text:
    """One line of text; (x, y) is the left end of its baseline."""

    x: float
    y: float
    text: str
    size: float
    color: str
    bold: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom)."""
        width = text_width(self.text, self.size, self.bold)
        return self.x, self.y - 0.75 * self.size, self.x + width, self.y + 0.22 * self.size

    def moved(self, dx: float, dy: float) -> Text:
        return replace(self, x=self.x + dx, y=self.y + dy)

    def svg(self) -> str:
        weight = ' font-weight="600"' if self.bold else ""
        length = _n(text_width(self.text, self.size, self.bold))
        return (
            f'<text x="{_n(self.x)}" y="{_n(self.y)}" font-size="{_n(self.size)}"{weight} '
            f'fill="{self.color}" textLength="{length}" lengthAdjust="spacingAndGlyphs">'
            f"{escape(self.text)}</text>"
        )

    def paint(self, pen: Any, scale: int) -> None:
        face = _face(self.size * scale)
        x, middle = self.x, self.y - 0.33 * self.size
        for letter in self.text:  # one by one: the face's own advances are rounded to pixels
            if letter == "→":  # which the face does not have
                shaft = ((x + 0.05 * self.size, middle), (x + 0.88 * self.size, middle))
                Line(shaft, self.color, 1, 0.36 * self.size).paint(pen, scale)
            elif letter != " ":
                stroke = 0.022 * self.size * scale if self.bold else 0
                where = (x * scale, self.y * scale)
                pen.text(where, letter, self.color, face, "ls", stroke_width=stroke)
            x += text_width(letter, self.size, self.bold)


@functools.cache
def _face(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


@dataclass
class Canvas:
    """Shapes in the order of drawing, and the size that they need."""

    width: float = 0.0
    height: float = 0.0
    shapes: list[Shape] = field(default_factory=list[Shape])

    def add(self, *shapes: Shape) -> Self:
        """Draws shapes over what is there."""
        self.shapes.extend(shapes)
        return self

    def paste(self, other: Canvas, x: float, y: float) -> Self:
        """Draws another canvas at (x, y) and grows to hold it."""
        self.shapes.extend(s.moved(x, y) for s in other.shapes)
        self.width = max(self.width, x + other.width)
        self.height = max(self.height, y + other.height)
        return self

    def write(
        self, x: float, y: float, text: str, size: float, color: str, bold: bool = False
    ) -> float:
        """Writes a line of text and returns where it ends."""
        self.add(Text(x, y, text, size, color, bold))
        return x + text_width(text, size, bold)

    def svg(self, title: str, background: str) -> bytes:
        """The picture as a self-contained SVG document."""
        w, h = math.ceil(self.width), math.ceil(self.height)
        face = "Helvetica, Arial, 'Liberation Sans', sans-serif"
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" '
            f'viewBox="0 0 {w} {h}" role="img" font-family="{face}" xml:space="preserve">',
            f"<title>{escape(title)}</title>",
            "<style>text { pointer-events: none }</style>",
            f'<rect width="{w}" height="{h}" fill="{background}"/>',
            "<g>",
            *(s.svg() for s in self.shapes),
            "</g>",
            "</svg>",
        ]
        return ("\n".join(lines) + "\n").encode()

    def png(self, background: str) -> bytes:
        """The picture as a PNG file.

        Raises:
            ExportError: Pillow is missing, or the picture is too large for pixels.
        """
        try:
            from PIL import Image, ImageDraw
        except ImportError as error:
            raise ExportError(
                "drawing a PNG needs Pillow: pip install 'peftfx[draw]'. SVG needs nothing."
            ) from error
        w, h = math.ceil(self.width), math.ceil(self.height)
        if w * h > LARGEST:
            raise ExportError(f"a PNG of {w} x {h} pixels is too large; draw an .svg file.")
        scale = SUPERSAMPLE if w * h * SUPERSAMPLE**2 <= LARGEST else 1
        image = Image.new("RGB", (w * scale, h * scale), background)
        pen: Any = ImageDraw.Draw(image)
        for shape in self.shapes:
            shape.paint(pen, scale)
        data = io.BytesIO()
        image.reduce(scale).save(data, "PNG", optimize=True)
        return data.getvalue()
