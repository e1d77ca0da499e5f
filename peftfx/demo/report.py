"""The demo's report: one self-contained HTML file with plots drawn as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

COLOURS = ("#4263eb", "#e8590c", "#2f9e44", "#9c36b5", "#0c8599", "#c2255c", "#868e96")

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#212529;max-width:960px;margin:2.5rem auto;
padding:0 1.2rem}h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
p.lead{color:#495057;margin-top:0}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}table.even{table-layout:fixed}
th,td{padding:.4rem .6rem;border-bottom:1px solid #dee2e6;text-align:right;white-space:nowrap;
vertical-align:top}th:first-child,td:first-child{text-align:left;position:sticky;left:0;
background:#fff}th{color:#495057;font-weight:600}
th.wide,td.wide{text-align:left}td.wide{white-space:normal;overflow-wrap:anywhere}
figure{margin:0}figcaption,small{color:#6c757d;font-size:.85rem}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem}
pre{background:#f8f9fa;border:1px solid #e9ecef;border-radius:6px;padding:.8rem;overflow-x:auto;
font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}.add{color:#2b8a3e;background:#ebfbee}
.del{color:#c92a2a;background:#fff5f5}svg{max-width:100%}
svg text{font:12px system-ui,sans-serif;fill:#495057}
.small{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}.small text{font-size:24px}
.small polyline{stroke-width:4}.small small{display:block;line-height:1.25}
@media(max-width:720px){.plots{grid-template-columns:1fr}}
@media(max-width:480px){body{margin:1rem auto;padding:0 .7rem;font-size:15px}
.small{grid-template-columns:1fr 1fr}h1{font-size:1.35rem}table{font-size:.8rem}
th,td{padding:.3rem .4rem}}
"""


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    start = math.ceil(low / step) * step
    return [start + i * step for i in range(int((high - start) / step + 1e-9) + 1)]


def _short(number: float) -> str:
    """1,000 as 1 k, a million as 1 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g} {letter}"
    return f"{number:g}"


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class Plot:
    """Axes with labels; data are placed in data coordinates."""

    left, bottom, top, right = 58, 46, 14, 16

    def __init__(
        self,
        x: Sequence[float],
        y: Sequence[float],
        labels: tuple[str, str],
        log: bool = False,
        height: int = 300,
    ) -> None:
        self.log, self.width, self.height = log, 460, height
        self.taken: list[Box] = []
        xs = [math.log10(v) for v in x] if log else list(x)
        pad_x = 0.08 * ((max(xs) - min(xs)) or 1)
        pad_y = 0.1 * ((max(y) - min(y)) or 0.01)
        self.x = (min(xs) - (pad_x if log else 0), max(xs) + pad_x)
        self.y = (min(y) - pad_y, max(y) + pad_y)
        self.parts: list[str] = []
        self._axes(labels)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel position of a data point."""
        if self.log:
            x = math.log10(x)
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.bottom - self.top),
        )

    def _axes(self, labels: tuple[str, str]) -> None:
        bottom = self.height - self.bottom
        marks = (
            [float(10**e) for e in range(math.ceil(self.x[0]), math.floor(self.x[1]) + 1)]
            if self.log
            else _ticks(*self.x)
        )
        for tick in _ticks(*self.y):
            _, y = self.at(10 ** self.x[0] if self.log else self.x[0], tick)
            self.parts.append(
                f'<line x1="{self.left}" x2="{self.width - self.right}" y1="{y:.1f}" '
                f'y2="{y:.1f}" stroke="#e9ecef"/>'
                f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
            )
        for tick in marks:
            x, _ = self.at(tick, self.y[0])
            label = _short(tick) if self.log else f"{tick:g}"
            self.parts.append(
                f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
            )
        self.parts.append(
            f'<line x1="{self.left}" x2="{self.width - self.right}" y1="{bottom}" y2="{bottom}" '
            'stroke="#adb5bd"/>'
            f'<text x="{(self.left + self.width) / 2}" y="{self.height - 8}" '
            f'text-anchor="middle">{html.escape(labels[0])}</text>'
            f'<text transform="translate(14 {self.height / 2 - 16}) rotate(-90)" '
            f'text-anchor="middle">{html.escape(labels[1])}</text>'
        )

    def points(self, named: Sequence[tuple[str, float, float]]) -> None:
        """Dots with their names, none of which covers another; far ones are tied by a line."""
        dots = [self.at(x, y) for _, x, y in named]
        self.taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
        for index, ((label, _, _), (x, y)) in enumerate(zip(named, dots, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            left, base = self._free(label, x, y)
            if abs(base - y) > 20:
                self.parts.append(
                    f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{left + 2:.1f}" '
                    f'y2="{base - 4 if base > y else base + 2:.1f}" stroke="#ced4da"/>'
                )
            self.parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
                f'<text x="{left:.1f}" y="{base:.1f}">{html.escape(label)}</text>'
            )

    def _free(self, label: str, x: float, y: float) -> tuple[float, float]:
        """Where a label near a dot starts, left end of its base line."""
        wide = 6.4 * len(label)
        room = (self.left, self.top - 12, self.width - self.right, self.height - self.bottom)
        lines = [-7, 15, 4, *(k * 13 for n in range(2, 16) for k in (n, -n))]
        for line in lines:
            for left in (x + 8, x - 8 - wide):
                box = (left, y + line - 10, left + wide, y + line + 3)
                inside = box[0] >= room[0] and box[2] <= room[2] + 10
                inside = inside and box[1] >= room[1] and box[3] <= room[3]
                if inside and not any(overlap(box, other) for other in self.taken):
                    self.taken.append(box)
                    return left, y + line
        return x + 8, y - 7

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str) -> None:
        """A curve."""
        path = " ".join(
            f"{px:.1f},{py:.1f}" for px, py in (self.at(x, y) for x, y in zip(xs, ys, strict=True))
        )
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        )

    def level(self, y: float, label: str) -> None:
        """A dashed horizontal line with a name."""
        _, py = self.at(10 ** self.x[0] if self.log else self.x[0], y)
        self.parts.append(
            f'<line x1="{self.left}" x2="{self.width - self.right}" y1="{py:.1f}" y2="{py:.1f}" '
            'stroke="#868e96" stroke-dasharray="4 3"/>'
            f'<text x="{self.width - self.right}" y="{py - 5:.1f}" text-anchor="end">'
            f"{html.escape(label)}</text>"
        )

    def svg(self) -> str:
        """The drawing."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'xmlns="http://www.w3.org/2000/svg">{"".join(self.parts)}</svg>'
        )


def quality_plot(points: Sequence[tuple[str, int, float]], base: float) -> str:
    """MRR against trained parameters (logarithmic), with the zero-shot level."""
    named = [(name, float(max(count, 1)), value) for name, count, value in points]
    counts = [count for _, count, _ in named]
    span = [min(counts) / 3, *counts, max(counts) * 3]
    values = [base, *(value for _, _, value in named)]
    plot = Plot(span, values, ("trained parameters", "MRR"), True, 300 + 8 * len(named))
    plot.level(base, "zero-shot")
    plot.points(named)
    return plot.svg()


def smoothed(curve: Sequence[float]) -> list[float]:
    """The mean of the steps around each, a sixth of the run to either side, fewer at its ends."""
    reach = max(1, len(curve) // 6)
    return [_mean(curve[max(0, i - reach) : i + reach + 1]) for i in range(len(curve))]


def loss_plot(curves: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Loss per step, its steps in light and what they come to in dark: a small plot for each
    method, all on one scale, with the loss at both ends in words."""
    if len(curves) == 1:
        return _losses(curves, 0, ("step", "loss")) + _ends(*curves[0])
    drawn = (
        f"<div>{_ends(name, curve)}{_losses(curves, index, ('', ''))}</div>"
        for index, (name, curve) in enumerate(curves)
    )
    return f'<div class="small">{"".join(drawn)}</div>'


def _ends(name: str, curve: Sequence[float]) -> str:
    line = smoothed(curve)
    return f"<small>{html.escape(name)}<br>{line[0]:.2f} → {line[-1]:.2f}</small>"


def _losses(
    curves: Sequence[tuple[str, Sequence[float]]], chosen: int, labels: tuple[str, str]
) -> str:
    longest = max(len(c) for _, c in curves)
    plot = Plot([0, longest], [0.0, *(v for _, c in curves for v in c)], labels)
    curve = curves[chosen][1]
    plot.line(range(1, len(curve) + 1), curve, "#ced4da")
    plot.line(range(1, len(curve) + 1), smoothed(curve), COLOURS[chosen % len(COLOURS)])
    return plot.svg()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], wide: Sequence[int] = ()) -> str:
    """An HTML table, without the columns that no row says anything in; `wide` columns wrap and
    align left."""
    shown = [i for i in range(len(head)) if any(row[i] for row in rows)]
    classes = [" class=wide" if i in wide else "" for i in range(len(head))]
    top = "".join(f"<th{classes[i]}>{html.escape(head[i])}</th>" for i in shown)
    body = "".join(
        f"<tr>{''.join(f'<td{classes[i]}>{html.escape(row[i])}</td>' for i in shown)}</tr>"
        for row in rows
    )
    even = " class=even" if len(wide) == len(head) else ""
    both = f"<table{even}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{both}</div>'


def diff_block(diff: str) -> str:
    """A coloured unified diff."""
    lines: list[str] = []
    for line in diff.splitlines():
        kind = {"+": "add", "-": "del"}.get(line[:1])
        text = html.escape(line)
        lines.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return f"<pre>{chr(10).join(lines)}</pre>"


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], foot: str) -> str:
    """The whole document."""
    body = "".join(f"<h2>{html.escape(head)}</h2>{content}" for head, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{lead}</p>{body}'
        f"<p><small>{html.escape(foot)}</small></p></body></html>"
    )
