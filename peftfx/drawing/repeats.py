"""Draws once what repeats: experts in a branch, weights on a line, layers of a stream."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .parts import Box, Layer, Row

MANY = 3
"""From this number on, boxes of one level that differ only in numbers are drawn once."""


def pattern(text: str) -> str:
    """`text` with every number as `*`, as a selector's suffix may have it."""
    return re.sub(r"\d+", "*", text)


def common(names: Sequence[str]) -> str:
    """Names that differ in numbers only, as one: those numbers become `*`."""
    columns = zip(*(re.split(r"(\d+)", n) for n in names), strict=False)
    return "".join(c[0] if len(set(c)) == 1 else "*" for c in columns)


def _face(box: Box, numbered: Mapping[int, int], hits: frozenset[str]) -> tuple[object, ...]:
    """What a box looks like but for the numbers in its names."""
    return (
        tuple((s.kind, s.role, pattern(s.module), s.describe(), s.id in hits) for s in box.sites),
        pattern(box.label), box.fed, box.level, len(box.alike),
        tuple(numbered.get(id(p), -1) for p in box.parents),
    )  # fmt: skip


def merge(boxes: list[Box], hits: frozenset[str]) -> list[Box]:
    """Draws experts and other repeated boxes once (see `Box.alike`)."""
    groups: dict[object, list[Box]] = {}
    for box in boxes:
        key = (box.level, box.label, box.fed, tuple(
            (s.kind, s.role, pattern(s.module), s.describe(), s.id in hits) for s in box.sites
        ))  # fmt: skip
        groups.setdefault(key, []).append(box)
    into: dict[int, Box] = {}
    for group in groups.values():
        for box in group[1:] if len(group) >= MANY and group[0].sites else []:
            into[id(box)] = group[0]
            group[0].absorb(box)
    kept = [b for b in boxes if id(b) not in into]
    for box in kept:
        box.parents = list(dict.fromkeys(into.get(id(p), p) for p in box.parents))
    return kept


def runs(faces: Sequence[object], least: int, longest: int = 8) -> list[tuple[int, int, int]]:
    """(start, period, count) of repeated stretches, greedily from the left; at least `least`
    single ones or three longer ones in a row."""
    repeats: list[tuple[int, int, int]] = []
    start = 0
    while start < len(faces):
        best = (start, 1, 1)
        for period in range(1, longest + 1):
            count = 1
            unit = faces[start : start + period]
            while faces[start + count * period : start + (count + 1) * period] == unit:
                count += 1
            enough = count >= (least if period == 1 else MANY)
            if enough and period * count > best[1] * best[2]:
                best = (start, period, count)
        repeats.append(best)
        start += best[1] * best[2]
    return repeats


def compress(layers: list[Layer], hits: frozenset[str]) -> list[Layer]:
    """Layers that look alike and are hit alike as one, also when kinds of layers alternate."""

    def face(layer: Layer) -> list[object]:
        numbered = {id(b): i for i, b in enumerate(layer)}
        shape = [len(s.lanes) if isinstance(s, Row) else 0 for s in layer.steps]
        return [shape, *(_face(b, numbered, hits) for b in layer)]

    faces = [face(layer) for layer in layers]
    kept: list[Layer] = []
    for start, period, count in runs(faces, 2):
        unit: dict[int, Layer] = {}  # place in the repeated unit -> the layer drawn for it
        for step in range(period):
            layer = layers[start + step]
            unit[step] = layer
            if step and faces[start + step] == faces[start + step - 1]:
                unit[step] = unit[step - 1]
            else:
                kept.append(layer)
        for index in range(start, start + period * count):
            same, other = unit[(index - start) % period], layers[index]
            if same is not other:
                same.numbers += other.numbers
                for box, twin in zip(same, other, strict=True):
                    box.absorb(twin)
    return kept
