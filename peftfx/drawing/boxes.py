"""One box of a drawing: what a site is called, what it holds, and whether a selector hits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..rewriter.program.sites import AttentionSite, EmbeddingSite, LinearSite, Site
from .canvas import Canvas, Circle, Line, Rect, shorten, text_width
from .parts import Box, site_weight
from .repeats import common, pattern

INK, MUTED, FAINT, EDGE, PAPER = "#1f2937", "#5b6472", "#cbd2da", "#8a94a3", "#ffffff"
HIT_FILL, HIT_EDGE, HIT_INK = "#ffd9a0", "#b45309", "#5f2c05"

FAMILIES = {
    "attention": ("#dcebfd", "#6d9edb"),
    "feed-forward": ("#ddf3e4", "#63ac80"),
    "norm": ("#ececf1", "#a2a6b4"),
    "embedding": ("#ece3fb", "#a58bd8"),
    "convolution": ("#d8f0f2", "#5da5ab"),
    "mixer": ("#fbe4e0", "#d18b7e"),
    "other": ("#fdf3d4", "#c9ad58"),
}
"""Fill and outline of boxes by what they belong to."""

BODY, SMALL = 12.0, 10.5
NAME = 150.0  # longest name that is not shortened


def family(site: Site) -> str:
    """The key of `FAMILIES` for a site."""
    first = site.role.partition(".")[0]
    roles = dict.fromkeys(("q", "k", "v", "o", "attn"), "attention")
    name = (roles | {"ffn": "feed-forward", "conv": "convolution"}).get(first, first)
    return name if name in FAMILIES else site.kind if site.kind in FAMILIES else "other"


def word(site: Site) -> str:
    """The word of the selector grammar for a site."""
    if site.kind == "embedding":
        return f"embedding.{site.role}"
    return site.role if site_weight(site) else site.kind


def details(site: Site) -> list[str]:
    """What a box says below its name."""
    if isinstance(site, AttentionSite):
        lines = [f"{site.heads} heads of {site.head_dim}"]
        lines += [f"{site.kv_heads} key/value heads"] if site.kv_heads != site.heads else []
        return lines + (["causal"] if site.causal else [])
    if isinstance(site, LinearSite):
        lines = [f"{site.in_features} → {site.out_features}"]
        names = [n for n in dict.fromkeys((*site.tied, site.weight)) if n != site.id]
        if site.tied and site.features is None:
            lines.append(f"tied to {names[0].removesuffix('.weight')}" if names else "tied")
        return lines + ([f"{len(site.nodes)} calls"] if len(site.nodes) > 1 else [])
    if isinstance(site, EmbeddingSite):
        lines = [f"{site.size} x {site.width}"]
        return lines + [f"tied to {t.removesuffix('.weight')}" for t in site.tied[:1]]
    return [p for p in site.describe().replace("->", "→").split("; ") if p]


@dataclass
class Placed:
    """The place of a drawn box in its region."""

    x: float
    y: float
    w: float
    h: float

    @property
    def middle(self) -> float:
        return self.y + self.h / 2


def tick(canvas: Canvas, x: float, y: float) -> None:
    """The mark of a hit."""
    hook = ((x - 3.2, y + 0.2), (x - 0.8, y + 2.8), (x + 3.4, y - 2.6))
    canvas.add(Circle(x, y, 7, HIT_EDGE, PAPER, 1.2), Line(hook, PAPER, 1.8))


class BoxPainter:
    """Draws boxes; `hits` are the selected sites (None: no selection)."""

    def __init__(self, hits: frozenset[str] | None) -> None:
        self.hits = hits
        self.names: list[str] = []
        """Patterns of the modules of the stream that is drawn, for `name`."""

    def name(self, box: Box) -> str:
        """The shortest end of a module's name that no other module of its stream has."""
        parts = common([s[0].module for s in (box.sites, *box.alike)]).split(".")
        mine = pattern(box.sites[0].module)
        for count in range(1, len(parts)):
            end = pattern(".".join(parts[-count:]))
            others = {n for n in self.names if f".{n}".endswith(f".{end}")} - {mine}
            if not others and not parts[-count].isdigit() and parts[-count:] != ["*"]:
                return shorten(".".join(parts[-count:]), NAME, BODY)
        return shorten(".".join(parts), NAME, BODY)

    def _colors(self, sites: Sequence[Site]) -> tuple[str, str, float, str, str]:
        """(fill, outline, its width, text, small text)"""
        fill, edge = FAMILIES[family(sites[0])] if sites else (PAPER, EDGE)
        if self.hits is None:
            return fill, edge, 1.2, INK, MUTED
        if any(s.id in self.hits for s in sites):
            return HIT_FILL, HIT_EDGE, 2.0, HIT_INK, HIT_INK
        return PAPER, FAINT, 1.0, MUTED, MUTED

    def plate(self, canvas: Canvas, sites: Sequence[Site], all_: Sequence[Site], place: Placed,
               copies: int = 1, radius: float = 4.0) -> tuple[str, str]:  # fmt: skip
        """The outline of a box with its tooltip and, if hit, its mark; returns text colours."""
        fill, edge, width, ink, muted = self._colors(sites)
        x, y, w, h = place.x, place.y, place.w, place.h
        for step in (6, 3) if copies > 1 else ():
            canvas.add(Rect(x + step, y + step, w, h, fill, edge, width, radius))
        hit = bool(self.hits) and any(s.id in (self.hits or ()) for s in sites)
        title = "\n".join(s.id for s in all_)
        mark = "hit" if hit else "site"
        canvas.add(Rect(x, y, w, h, fill, edge, width, radius, title, mark))
        if hit:
            tick(canvas, x + w - 2, y + 1)
        return ink, muted

    def box(self, box: Box, copies: int) -> Canvas:
        """One box; `copies` are the layers for which it stands anyway."""
        if not box.sites:
            text = shorten(box.label, NAME + 30, SMALL)
            canvas = Canvas(text_width(text, SMALL) + 18, 24)
            canvas.add(Rect(0.5, 0.5, canvas.width - 1, 23, PAPER, EDGE, 1.0, 12))
            canvas.write(9, 15.5, text, SMALL, INK if self.hits is None else MUTED)
            return canvas
        times = (len(box.alike) + 1) // max(copies, 1)
        return self._fused(box, times) if len(box.sites) > 1 else self._single(box, times)

    def _single(self, box: Box, times: int) -> Canvas:
        site = box.sites[0]
        operator = not site_weight(site)
        role, name = word(site), "" if operator else self.name(box)
        if times > 1:
            name = f"{times} x  {name}"
        lines = [shorten(d, NAME + 40, SMALL) for d in details(site)]
        indent = text_width(role + "  ", BODY, True)
        inner = max(indent + text_width(name, BODY), *(text_width(t, SMALL) for t in lines), 40.0)
        place = Placed(1, 1, inner + 22, 22 + 14 * len(lines) + (2 if lines else 4))
        extra = 6 if times > 1 else 0
        canvas = Canvas(place.w + 2 + extra, place.h + 2 + extra)
        radius = 16 if operator else 4
        ink, muted = self.plate(canvas, box.sites, box.everything, place, times, radius)
        canvas.write(11, 17, role, BODY, ink, True)
        if name:
            canvas.write(11 + indent, 17, name, BODY, muted)
        for index, line in enumerate(lines):
            canvas.write(11, 32 + 14 * index, line, SMALL, muted)
        return canvas

    def _fused(self, box: Box, times: int) -> Canvas:
        """One weight, divided by the roles of its features."""
        first = box.sites[0]
        parts = [int(getattr(s, "out_features", 0)) for s in box.sites]
        name = f"{times} x  {self.name(box)}" if times > 1 else self.name(box)
        size = f"{getattr(first, 'in_features', 0)} → {sum(parts)}"
        if experts := getattr(first, "experts", 0):
            size = f"{experts} of {size}"
        cells = [(s, word(s), str(n)) for s, n in zip(box.sites, parts, strict=True)]
        wide = max(
            text_width(w, BODY, True) + text_width(n, SMALL) + 26 for _, w, n in cells
        )  # fmt: skip
        inner = max(wide * len(cells) + 6 * (len(cells) - 1), text_width(name, BODY) + 6
                    + text_width(size, SMALL))  # fmt: skip
        wide = (inner - 6 * (len(cells) - 1)) / len(cells)
        canvas = Canvas(inner + 18, 62)
        _, edge = FAMILIES[family(first)]
        pale = self.hits is not None
        canvas.add(Rect(1, 1, inner + 16, 60, PAPER, FAINT if pale else edge, 1.2, 4))
        end = canvas.write(9, 17, name, BODY, MUTED if pale else INK)
        canvas.write(end + 6, 17, size, SMALL, MUTED)
        for index, (site, role, count) in enumerate(cells):
            same = [sites[index] for sites in box.alike]
            place = Placed(9 + index * (wide + 6), 27, wide, 26)
            ink, muted = self.plate(canvas, (site,), [site, *same], place)
            end = canvas.write(place.x + 9, 44, role, BODY, ink, True)
            canvas.write(end + 6, 44, count, SMALL, muted)
        return canvas
