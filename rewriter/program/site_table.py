"""All sites of a program: looked up by id, selected by text, printed as a table."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..errors import SelectorError, SiteError, nearest
from .selector import choose, select
from .sites import Site, WeightSite, listed


@dataclass(frozen=True)
class Sites:
    """All sites of a program; iterable, selectable, printable as a table."""

    items: tuple[Site, ...]

    def __post_init__(self) -> None:
        twice = [i for i, n in Counter(s.id for s in self.items).items() if n > 1]
        if twice:
            raise SiteError(
                f"{len(twice)} ids belong to several sites each, first {twice[0]!r}. Please report "
                "the model; no pass can tell them apart."
            )

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, site_id: str) -> Site:
        """The site of an id.

        Raises:
            SiteError: there is none (also a KeyError); names the nearest.
        """
        if (site := self._by_id.get(site_id)) is not None:
            return site
        raise SiteError(
            f"there is no site {site_id!r} among {len(self.items)}. Nearest: "
            f"{nearest(site_id, (s.id for s in self.items))}. Print program.sites to see them."
        )

    @functools.cached_property
    def _by_id(self) -> dict[str, Site]:
        return {site.id: site for site in self.items}

    @functools.cached_property
    def by_weight(self) -> dict[str, list[WeightSite]]:
        """The sites of each stored weight, in graph order."""
        sites: dict[str, list[WeightSite]] = {}
        for site in self.items:
            if isinstance(site, WeightSite):
                sites.setdefault(site.weight, []).append(site)
        return sites

    def of(self, *kinds: str) -> tuple[Site, ...]:
        """The sites of the given kinds."""
        return tuple(s for s in self.items if s.kind in kinds)

    def select(self, selector: str, kinds: tuple[str, ...] = ()) -> list[Site]:
        """The sites that a selector matches, in graph order.

        Args:
            selector: see `rewriter/program/selector.py` for the grammar.
            kinds: only consider sites of these kinds (all kinds by default).

        Raises:
            SelectorError: it is malformed, or it or a part of it matches nothing, or nothing of
                these kinds.
        """
        if not kinds:
            return choose(selector, self.items)
        selection = select(selector, self.items, kinds)
        if not selection.taken:
            raise SelectorError(
                f"where={selector!r} matches {listed(selection.left)}, but no "
                f"{' or '.join(kinds)} site. Say where with other words: program.sites, or "
                "peftfx sites MODEL, lists them."
            )
        return list(selection.taken)

    def __str__(self) -> str:
        table = Table(title=None, box=None, pad_edge=False, header_style="bold")
        for column in ("site", "kind", "role", "layer", ""):
            table.add_column(column, overflow="fold")
        for site in self.items:
            layer = "" if site.layer is None else str(site.layer)
            table.add_row(site.id, site.kind, site.role, layer, site.describe())
        text = io.StringIO()
        Console(width=140, file=text, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
