"""What a drawing is made of, before it has coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..rewriter.program.sites import Site


def site_weight(site: Site) -> str:
    """The name of the parameter that a site is; '' for operators, which combine other sites."""
    return getattr(site, "weight", "")


@dataclass(eq=False)
class Box:
    """One weight or operator; a fused weight is one box of several sites.

    Attributes:
        sites: what it shows; none for a `label` that says where a value comes from.
        parents: boxes of the same region that it reads.
        fed: it reads the residual line.
        level: length of the longest path of boxes that leads to it.
        alike: the sites of boxes that this one stands for too.
    """

    sites: tuple[Site, ...] = ()
    label: str = ""
    parents: list[Box] = field(default_factory=list["Box"])
    fed: bool = False
    level: int = 0
    alike: list[tuple[Site, ...]] = field(default_factory=list[tuple[Site, ...]])

    @property
    def everything(self) -> list[Site]:
        """All sites that it stands for."""
        return [*self.sites, *(s for sites in self.alike for s in sites)]

    def absorb(self, other: Box) -> None:
        """Lets this box stand for `other` too."""
        self.alike += [other.sites, *other.alike]


@dataclass
class Line:
    """Boxes on the residual line, or, `aside`, shared by several layers."""

    boxes: list[Box]
    aside: list[Box] = field(default_factory=list[Box])

    def __iter__(self) -> Iterator[Box]:
        yield from self.boxes
        yield from self.aside


@dataclass
class Lane:
    """One sublayer: the box of its own site and those of its branch."""

    head: Box
    boxes: list[Box]


@dataclass
class Row:
    """The sublayers that end in one residual add, and the boxes that all of them read."""

    shared: list[Box]
    lanes: list[Lane]

    def __iter__(self) -> Iterator[Box]:
        yield from self.shared
        for lane in self.lanes:
            yield lane.head
            yield from lane.boxes


@dataclass
class Layer:
    """One block of a stream; `numbers` are the layers that it stands for."""

    numbers: list[int]
    steps: list[Row | Line]

    def __iter__(self) -> Iterator[Box]:
        for step in self.steps:
            yield from step


@dataclass
class Stream:
    """A chain of residual sublayers with what leads to it and from it."""

    name: str
    before: Line
    layers: list[Layer]
    after: Line

    def __iter__(self) -> Iterator[Box]:
        yield from self.before
        for layer in self.layers:
            yield from layer
        yield from self.after
