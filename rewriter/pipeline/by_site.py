"""Options with a value for each site: `rank={q=8,ffn=16,default=4}`.

An entry's key is a selector. Of the entries that match a site, the first one says its value, and
`default` says that of sites that none matches. A plan holds what this gives for every site, so that
replaying it, loading and reading saved adapters ask no selector again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import OptionError, SelectorError
from ..program.history import Plan
from ..program.selector import select
from ..program.sites import Site, listed
from .options import DEFAULT, hints_of, is_by_site, write_value


def maps_of(item: Any) -> dict[str, Mapping[str, Any]]:
    """A pass's options that have a value for each site, with their entries."""
    hints = hints_of(type(item))
    named = (f.name for f in fields(item) if is_by_site(hints[f.name]))
    return {n: entries for n in named if isinstance(entries := getattr(item, n), Mapping)}


def values_at(item: Any, sites: Sequence[Site], every: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Site id -> option -> its value there, of the options that have one for each site.

    Args:
        item: a pass.
        sites: those that it takes.
        every: all of the program's.

    Raises:
        SelectorError: a key is malformed, or matches no site of the program.
        OptionError: an entry says nothing, or a site has no value.
    """
    found: dict[str, dict[str, Any]] = {s.id: {} for s in sites}
    for option, entries in maps_of(item).items():
        said = f"{item.text}: {option}={write_value(entries)}"
        for site, value in _first(said, entries, sites, every):
            found[site][option] = value
    return {site: values for site, values in found.items() if values}


def site_of(plan: Plan, module: str) -> str:
    """The site with options of its own in whose name a saved branch lies; '' without one."""
    stated: Any = plan.decisions.get("options")
    ids: list[str] = list(stated) if isinstance(stated, Mapping) else []
    return next((i for i in ids if i.removesuffix(".weight").replace(":", ".") == module), "")


def _first(
    said: str, entries: Mapping[str, Any], sites: Sequence[Site], every: Sequence[Site]
) -> Iterator[tuple[str, Any]]:
    left = list(sites)
    kinds = {s.kind for s in sites}
    for key, value in entries.items():
        if key == DEFAULT:
            continue
        try:
            matching = select(key, every, [*kinds]).taken
        except SelectorError as error:
            raise SelectorError(f"{said}: the entry {key!r}: {error}") from error
        mine = [s for s in left if s in matching]
        if not mine:
            raise OptionError(f"{said}: the entry {key!r} {_idle(sites, matching)}.")
        yield from ((s.id, value) for s in mine)
        left = [s for s in left if s not in mine]
    if left and DEFAULT not in entries:
        raise OptionError(
            f"{said} says nothing of {listed(left)}. Give all others a value: {DEFAULT}=..."
        )
    yield from ((s.id, entries[DEFAULT]) for s in left)


def _idle(sites: Sequence[Site], matching: Sequence[Site]) -> str:
    """Why an entry says nothing."""
    if any(s in matching for s in sites):
        return (
            "matches only what entries before it match, and the first one counts. Say it before "
            "them, or leave it out"
        )
    return f"matches none of the selected sites ({listed(sites)}). Select its sites with where=, " \
        "or leave it out"  # fmt: skip
