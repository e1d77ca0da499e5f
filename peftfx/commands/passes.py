"""List the passes, or all options of one.

JSON: name -> what it does; with a name `{name, about, contract, folds, source, file, options,
example}`, an option being `{name, type, default, meaning}`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..pass_pages import Option, page
from ..rewriter.pipeline.passes import REGISTRY, lookup
from ..terminal import say, say_table


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""
    about = "tell its options: types, defaults, meanings; what it promises, and its source"
    parser.add_argument("name", nargs="?", help=about)


def command(options: Any) -> Any:
    """Runs the command."""
    if options.name is None:
        pages = [page(cls) for _, cls in sorted(REGISTRY.items())]
        say_table(options, ("pass", "what it does"), [(p.name, p.about) for p in pages])
        return {p.name: p.about for p in pages}
    shown = page(lookup(options.name))
    say(options, shown.about)
    for title, text in (
        ("promises", shown.contract), ("folds", shown.folds), ("source", shown.source),
        ("file", shown.file),
    ):  # fmt: skip
        if text:
            say(options, f"  {title}: {text}")
    say(options, "")
    say_table(options, ("option", "type", "default", "meaning"), [_row(o) for o in shown.options])
    say(options, "")
    say(options, f"for example: {shown.example}")
    return shown.to_json()


def _row(option: Option) -> tuple[str, ...]:
    return option.name, option.type, option.default, option.meaning
