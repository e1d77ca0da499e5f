"""From regions to shapes: streams run down the page, each sublayer is a loop beside its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .boxes import BODY, EDGE, INK, MUTED, PAPER, SMALL, BoxPainter, Placed
from .canvas import Canvas, Circle, Line, Rect, Shape, text_width
from .parts import Box, Lane, Layer, Row, Stream, site_weight
from .parts import Line as OnLine
from .repeats import MANY, common, pattern, runs

STEM = 18.0  # the residual line's distance from the left end of its stream
LANES = STEM + 34  # where the boxes of a row begin
GAP = 30.0  # between the boxes of successive levels in a branch
WIDE = 4  # most boxes side by side on the line
TALL = 28  # most levels of a column before the next one begins
HEAD = 6.0  # length of an arrow head
BAND, FRAME = "#f7f9fb", "#e2e7ed"


class Painter(BoxPainter):
    """Draws whole streams."""

    # A branch: levels from left to right.

    def branch(self, boxes: Sequence[Box], copies: int) -> tuple[Canvas, dict[int, Placed]]:
        """The boxes of a branch with the arrows between them; their places by id."""
        drawn = {id(b): self.box(b, copies) for b in boxes}
        columns: list[list[Box]] = [
            [] for _ in range(max((b.level for b in boxes), default=-1) + 1)
        ]
        for box in boxes:
            columns[box.level].append(box)
        readers = {id(b): [i for i, r in enumerate(boxes) if b in r.parents] for b in boxes}
        for column in columns[:1]:
            column.sort(key=lambda b: min(readers[id(b)], default=0))
        places: dict[int, Placed] = {}
        x = 0.0
        for column in columns:
            width = max(drawn[id(b)].width for b in column)
            y = 0.0
            for box in column:
                one = drawn[id(box)]
                places[id(box)] = Placed(x, y, one.width, one.height)
                y += one.height + 8
            x += width + GAP
        _align(columns, places)
        low = min((p.y for p in places.values()), default=0.0)
        for place in places.values():
            place.y -= low
        canvas = Canvas()
        for box in boxes:
            for parent in box.parents:
                sets = list(dict.fromkeys(tuple(readers[id(b)]) for b in columns[parent.level]))
                lane = sets.index(tuple(readers[id(parent)])) - (len(sets) - 1) / 2
                start, end = places[id(parent)], places[id(box)]
                between = [places[id(b)] for c in columns[parent.level + 1 : box.level] for b in c]
                if any(p.y - 3 < start.middle < p.y + p.h + 3 for p in between):
                    canvas.add(_bridge(start, end, min(p.y for p in [start, end, *between]) - 6))
                else:
                    canvas.add(_elbow(start, end, max(-9, min(9, 6 * lane))))
        for box in boxes:
            canvas.paste(drawn[id(box)], places[id(box)].x, places[id(box)].y)
        return canvas, places

    def lane(self, lane: Lane, copies: int) -> tuple[Canvas, dict[int, Placed]]:
        """One sublayer: its caption above its branch."""
        site = lane.head.sites[0]
        kind = site.id.rpartition(".")[2] if "." in site.id else site.role
        wide = text_width(kind, SMALL, True) + 4 + text_width("sublayer", SMALL)
        canvas = Canvas()
        place = Placed(1, 1, wide + 16, 19)
        ink, muted = self.plate(canvas, lane.head.sites, lane.head.everything, place, radius=9.5)
        end = canvas.write(9, 14.3, kind, SMALL, ink, True)
        canvas.write(end + 4, 14.3, "sublayer", SMALL, muted)
        canvas.width = canvas.write(place.w + 13, 14.3, site.describe(), SMALL, MUTED)
        canvas.height = 20
        if not lane.boxes:
            canvas.width = max(canvas.width, canvas.write(
                1, 38, "the weights are those of an earlier layer", SMALL, MUTED))  # fmt: skip
            canvas.height = 44
            return canvas, {}
        body, places = self.branch(lane.boxes, copies)
        canvas.paste(body, 0, 30)
        for spot in places.values():
            spot.y += 30
        return canvas, places

    def row(self, row: Row, copies: int) -> Canvas:
        """All sublayers that end in one add, as lanes from the line and back to it."""
        lanes = _Lanes(*self.branch(row.shared, copies), bool(row.shared))
        for lane in row.lanes:
            lanes.add(*self.lane(lane, copies))
        lanes.place_shared()
        canvas = Canvas()
        canvas.add(*_into(row, lanes.places), *_across(row, lanes), *_out_of(row, lanes))
        lanes.paste(canvas)
        canvas.width, canvas.height = lanes.right + 4, lanes.bottom + 12
        return _stem(canvas, lanes.bottom)

    # The line: levels from top to bottom.

    def line(self, line: OnLine, copies: int, flow: bool = True) -> list[Canvas]:
        """The boxes on the residual line, in pieces that can be stacked."""
        levels: list[list[Box]] = [
            [] for _ in range(max((b.level for b in line.boxes), default=-1) + 1)
        ]
        for box in line.boxes:
            levels[box.level].append(box)
        faces = [[(b.label, *((s.kind, s.role, pattern(s.module), s.describe(),
                    s.id in (self.hits or ())) for s in b.sites)) for b in level]
                 for level in levels]  # fmt: skip
        pieces: list[Canvas] = []
        for start, period, count in runs(faces, MANY):
            unit = levels[start : start + period]
            for step in range(1, count):
                for level, other in zip(unit, levels[start + step * period :], strict=False):
                    for box, twin in zip(level, other, strict=True):
                        box.absorb(twin)
            canvases = [
                self._level(level, copies * (count if period > 1 else 1), flow) for level in unit
            ]
            pieces += (
                [self._frame(canvases, f"{count} times")] if count > 1 and period > 1 else canvases
            )
        if line.aside:
            pieces.append(self._level(line.aside, copies, False, "shared by several layers"))
        return pieces

    def _level(self, boxes: Sequence[Box], copies: int, flow: bool, note: str = "") -> Canvas:
        canvas = Canvas()
        y = 6.0
        if note:
            canvas.width = canvas.write(STEM + 16, 18, note, SMALL, MUTED)
            y = 26.0
        for at in range(0, len(boxes), WIDE):
            x = STEM + 16 if note else 0.0
            drawn = [self.box(b, copies) for b in boxes[at : at + WIDE]]
            height = max(d.height for d in drawn)
            ends: list[float] = []
            for one in drawn:
                canvas.paste(one, x, y)
                ends.append(x + STEM if not ends else x + one.width / 2)
                x += one.width + 14
            y += height
            if flow and len(ends) > 1:
                canvas.shapes[:0] = [
                    Line(((e, y - 4), (e, y + 8), (STEM, y + 8)), EDGE) for e in ends
                ]
            y += 10
        canvas.height = y + 4
        return _stem(canvas) if flow or note else canvas

    def _frame(self, pieces: Sequence[Canvas], note: str, title: str = "") -> Canvas:
        """Pieces of a stream, stacked in a frame."""
        inner = _stack(pieces)
        canvas = Canvas()
        head = 26.0 if title or note else 6.0
        width = inner.width + 22
        canvas.paste(inner, 0, head)
        x = STEM + 16
        if title:
            x = canvas.write(x, 17, title, BODY, INK, True) + 10
        x = canvas.write(x, 17, note, SMALL, MUTED)
        canvas.width = max(width, x + 12)
        canvas.height = head + inner.height + 6
        band = Rect(-10, 1, canvas.width + 6, canvas.height - 4, BAND, FRAME, 1.2, 8)
        canvas.shapes.insert(0, band)
        return _stem(canvas, after=1)

    def layer(self, layer: Layer) -> Canvas:
        """One layer, or several that are alike."""
        copies = len(layer.numbers)
        pieces: list[Canvas] = []
        for step in layer.steps:
            pieces += (
                self.line(step, copies) if isinstance(step, OnLine) else [self.row(step, copies)]
            )
        names = [
            common([s.module for s in b.everything])
            for b in layer if b.sites and site_weight(b.sites[0])
        ]  # fmt: skip
        prefix = _prefix(names)
        note = (f"{copies} alike" + (f"; {prefix}" if prefix else "")) if copies > 1 else prefix
        return self._frame(pieces, note, span(layer.numbers))

    def stream(self, stream: Stream) -> Canvas:
        """One stream from its inputs to its results."""
        self.names = [pattern(s.module) for b in stream for s in b.everything]
        pieces = self.line(stream.before, 1)
        pieces += [self.layer(layer) for layer in stream.layers]
        after = self.line(stream.after, 1)
        canvas = _stack([*pieces, *after])
        canvas.add(Line(((STEM, canvas.height - 1), (STEM, canvas.height + 16)), EDGE, 2, 7))
        canvas.height += 20
        return canvas

    def chain(self, line: OnLine) -> list[Canvas]:
        """Sites outside of all streams, in columns."""
        pieces = self.line(line, 1)
        return [_stack(pieces[at : at + TALL]) for at in range(0, len(pieces), TALL)]


class _Lanes:
    """The lanes of a row, one below the other, right of the boxes that they share.

    Attributes:
        places: of all boxes, by id.
        start: where the lanes begin, from the left.
    """

    def __init__(self, shared: Canvas, spots: dict[int, Placed], any_shared: bool) -> None:
        self.shared, self.spots = shared, spots
        self.canvases: list[tuple[Canvas, float]] = []
        self.places: dict[int, Placed] = {}
        self.start = LANES + (shared.width + GAP if any_shared else 0.0)
        self.y = 8.0

    def add(self, canvas: Canvas, spots: dict[int, Placed]) -> None:
        """One more lane below the others."""
        self.canvases.append((canvas, self.y))
        for key, spot in spots.items():
            self.places[key] = Placed(self.start + spot.x, self.y + spot.y, spot.w, spot.h)
        self.y += canvas.height + 16

    def place_shared(self) -> None:
        """The shared boxes in the middle of all lanes' height."""
        for key, spot in self.spots.items():
            self.places[key] = Placed(LANES + spot.x, self.middle + spot.y, spot.w, spot.h)

    @property
    def middle(self) -> float:
        """Top of the shared boxes."""
        return (self.y - 8 - self.shared.height) / 2

    @property
    def right(self) -> float:
        """Where the way back to the line runs."""
        return max([self.start + c.width for c, _ in self.canvases]) + 16

    @property
    def bottom(self) -> float:
        """Where it meets the line."""
        return self.y + 6

    def paste(self, canvas: Canvas) -> None:
        """Draws all boxes."""
        canvas.paste(self.shared, LANES, self.middle)
        for lane, top in self.canvases:
            canvas.paste(lane, self.start, top)


def _into(row: Row, places: dict[int, Placed]) -> Iterator[Line]:
    """From the line to what it feeds; over the heads of the columns before it, if it must."""
    fed = [b for b in _boxes(row) if b.fed]
    entries = [b for b in fed if b.level == 0 or not b.parents]
    spots = [places[id(b)] for b in entries]
    yield from _fan([(STEM, min((p.middle for p in spots), default=20.0))], spots, LANES - 14)
    for box in fed:
        if box in entries:
            continue
        spot = places[id(box)]
        top, turn = min(p.y for p in places.values()) - 5, spot.x - GAP / 2
        path = ((STEM, top), (turn, top), (turn, spot.middle), (spot.x, spot.middle))
        yield Line(path, EDGE, 1.4, HEAD)


def _across(row: Row, lanes: _Lanes) -> Iterator[Line]:
    """From the last shared boxes to the first of each lane."""
    own = [b for lane in row.lanes for b in lane.boxes]
    first = [lanes.places[id(b)] for b in own if not b.parents]
    for box in row.shared:
        if any(box in b.parents for b in row.shared):
            continue
        spot = lanes.places[id(box)]
        yield from _fan([(spot.x + spot.w, spot.middle)], first, lanes.start - 14)


def _out_of(row: Row, lanes: _Lanes) -> Iterator[Line]:
    """From what nothing in the row reads back to the line."""
    parents = {id(p) for b in _boxes(row) for p in b.parents}
    right, bottom = lanes.right, lanes.bottom
    for box in (b for lane in row.lanes for b in lane.boxes):
        if id(box) in parents:
            continue
        spot = lanes.places[id(box)]
        path = ((spot.x + spot.w, spot.middle), (right, spot.middle), (right, bottom))
        yield Line(path, EDGE)
    yield Line(((right, bottom), (STEM + 9, bottom)), EDGE, 1.4, HEAD)


def _boxes(row: Row) -> list[Box]:
    return [*row.shared, *(b for lane in row.lanes for b in lane.boxes)]


def _stack(pieces: Sequence[Canvas]) -> Canvas:
    canvas = Canvas()
    for piece in pieces:
        canvas.paste(piece, 0, canvas.height)
    return canvas


def _stem(canvas: Canvas, add: float | None = None, after: int = 0) -> Canvas:
    """Puts the residual line behind a piece, with the circled plus at height `add`."""
    canvas.shapes.insert(after, Line(((STEM, 0), (STEM, canvas.height)), EDGE, 2))
    if add is not None:
        canvas.add(*plus(STEM, add))
    return canvas


def plus(x: float, y: float) -> tuple[Shape, ...]:
    """The circled plus of a residual add."""
    return (
        Circle(x, y, 8, PAPER, EDGE, 1.6),
        Line(((x - 4, y), (x + 4, y)), INK, 1.6),
        Line(((x, y - 4), (x, y + 4)), INK, 1.6),
    )


def _elbow(start: Placed, end: Placed, shift: float) -> Line:
    """An arrow from box to box with one turn, or none where they are nearly at one height."""
    a, b = (start.x + start.w, start.middle), (end.x, end.middle)
    if abs(a[1] - b[1]) < 8:
        return Line((a, (b[0], a[1])), EDGE, 1.4, HEAD)
    turn = end.x - GAP / 2 - 1 + shift
    return Line((a, (turn, a[1]), (turn, b[1]), b), EDGE, 1.4, HEAD)


def _bridge(start: Placed, end: Placed, top: float) -> Line:
    """An arrow over the boxes that stand between two."""
    a, b = (start.x + start.w, start.middle), (end.x, end.middle)
    x, turn = a[0] + 8, end.x - GAP / 2 - 1
    path = (a, (x, a[1]), (x, top), (turn, top), (turn, b[1]), b)
    return Line(path, EDGE, 1.4, HEAD)


def _fan(start: Sequence[tuple[float, float]], ends: Sequence[Placed], trunk: float) -> list[Line]:
    """Arrows from a point over one vertical trunk to several boxes."""
    (x, y) = start[0]
    if ends and not min(p.middle for p in ends) <= y <= max(p.middle for p in ends):
        y = y if len(ends) > 1 else ends[0].middle
    return [
        Line(((x, y), (trunk, y), (trunk, p.middle), (p.x, p.middle)), EDGE, 1.4, HEAD)
        for p in ends
    ]


def _align(columns: list[list[Box]], places: dict[int, Placed]) -> None:
    """Moves boxes to the height of what they read, or, left of the tallest column, feed."""
    if not columns:
        return
    tall = max(range(len(columns)), key=lambda i: sum(places[id(b)].h + 8 for b in columns[i]))
    children: dict[int, list[Box]] = {}
    for column in columns:
        for box in column:
            for parent in box.parents:
                children.setdefault(id(parent), []).append(box)
    for index in [*range(tall + 1, len(columns)), *range(tall - 1, -1, -1)]:
        y = None
        for box in columns[index]:
            near = box.parents if index > tall else children.get(id(box), [])
            heights = [places[id(b)].middle for b in near]
            place = places[id(box)]
            wanted = sum(heights) / len(heights) - place.h / 2 if heights else place.y
            place.y = wanted if y is None else max(wanted, y)
            y = place.y + place.h + 8


def _prefix(names: Sequence[str]) -> str:
    """The dotted prefix that all names share, without the last part of any."""
    split = [n.split(".")[:-1] for n in names]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def span(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0 to 5`, `layers 0, 2, ... 10` for layer numbers."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) == 2:
        return f"layers {numbers[0]} and {numbers[1]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layers {numbers[0]}, {numbers[1]}, … {numbers[-1]}"
