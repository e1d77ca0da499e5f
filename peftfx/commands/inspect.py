"""Tell what an adapter is: method, rank, places, size, base, how much it changes.

The norm of a change is the Frobenius norm of what is added to the weight. It is told by factors
alone; of DoRA, (IA)3 and what is trained itself, the base's numbers are needed (`--base`).

JSON: `{path, format, methods, base, parameters, bytes, about, notes, norm, places}`; a place is
`{target, method, rank, scale, alpha, parameters, dtypes, norm, unknown, layer}`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..drawing.places import NUMBER, layer_of
from ..exporters.adapter_changes import Described, Place, describe
from ..exporters.base import checkpoint
from ..exporters.formats import format_of
from ..terminal import progress, say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    parser.add_argument("adapter", help="of any format that is read; no model is needed")
    about = "the directory of its model, whose files are read where the change depends on them"
    parser.add_argument("--base", metavar="DIR", help=about)
    parser.add_argument("--component", default="", help="which adapter of a file with several")
    about = "one row for each place, instead of one for each kind of place over all layers"
    parser.add_argument("--sites", action="store_true", help=about)


def command(options: Any) -> Any:
    """Runs the command."""
    format_of(options.adapter)
    with progress(options, f"reading {options.adapter}"):
        base = checkpoint(options.base) if options.base else None
        adapter = describe(options.adapter, base, options.component)
    for name, text in _about(adapter):
        say(options, f"{name + ':':12}{text}")
    say(options, "")
    if options.sites:
        rows = [_row(place.target, [place]) for place in adapter.places]
    else:
        rows = [_row(name, places) for name, places in by_kind(adapter.places).items()]
    say_table(options, _HEAD, rows, ("places", "numbers"))
    if layers := by_layer(adapter.places):
        say(options, "")
        rows = [_row(name, places) for name, places in layers.items()]
        say_table(options, ("layer", *_HEAD[1:]), rows, ("places", "numbers"))
    return _json(adapter)


_HEAD = ("place", "places", "method", "rank", "alpha", "numbers", "dtype", "norm of the change")


def _about(adapter: Described) -> list[tuple[str, str]]:
    said = [
        ("adapter", adapter.path),
        ("format", adapter.format),
        ("method", ", ".join(adapter.methods)),
        ("base", adapter.base or "not said"),
        ("size", f"{adapter.parameters:,} numbers, {_bytes(adapter.size)}"),
        ("says", ", ".join(f"{k}={v}" for k, v in adapter.about.items())),
        *(("note", text) for text in adapter.notes),
    ]
    said = [(name, text) for name, text in said if text]
    total = total_norm(adapter.places)
    return [*said, ("change", "not known for all places" if total is None else f"norm {total:.4g}")]


def total_norm(places: Sequence[Place]) -> float | None:
    """Of several changes together; None where one is not known."""
    norms = [place.norm for place in places]
    known = [n for n in norms if n is not None]
    return sum(n * n for n in known) ** 0.5 if len(known) == len(norms) else None


def _bytes(size: int) -> str:
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def by_kind(places: Sequence[Place]) -> dict[str, list[Place]]:
    """Places by their names without numbers."""
    kinds: dict[str, list[Place]] = {}
    for place in places:
        kinds.setdefault(NUMBER.sub("*", place.target), []).append(place)
    return kinds


def by_layer(places: Sequence[Place]) -> dict[str, list[Place]]:
    """Places by the layer that their names say; nothing, if there are less than two."""
    layers: dict[int, list[Place]] = {}
    for place in places:
        if (layer := layer_of(place.target)) is not None:
            layers.setdefault(layer, []).append(place)
    return {str(layer): layers[layer] for layer in sorted(layers)} if len(layers) > 1 else {}


def _row(name: str, places: Sequence[Place]) -> tuple[str, ...]:
    norm = total_norm(places)
    unknown = next((p.unknown for p in places if p.unknown), "")
    return (
        name or "(shared)", str(len(places)), _all(p.method for p in places),
        _all("" if p.rank is None else str(p.rank) for p in places),
        _all("" if p.alpha is None else f"{p.alpha:.4g}" for p in places),
        f"{sum(p.parameters for p in places):,}", _all(d for p in places for d in p.dtypes),
        unknown if norm is None else f"{norm:.4g}",
    )  # fmt: skip


def _all(words: Any) -> str:
    return ", ".join(dict.fromkeys(w for w in words if w))


def _json(adapter: Described) -> dict[str, Any]:
    return {
        "path": str(Path(adapter.path)), "format": adapter.format, "methods": adapter.methods,
        "base": adapter.base, "parameters": adapter.parameters, "bytes": adapter.size,
        "about": dict(adapter.about), "notes": adapter.notes,
        "norm": total_norm(adapter.places),
        "places": [
            {
                "target": p.target, "method": p.method, "rank": p.rank, "scale": p.scale,
                "alpha": p.alpha, "parameters": p.parameters, "dtypes": p.dtypes, "norm": p.norm,
                "unknown": p.unknown, "layer": layer_of(p.target),
            }
            for p in adapter.places
        ],
    }  # fmt: skip
