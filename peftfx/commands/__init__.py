"""One command is one file. Its docstring's first line is what `peftfx --help` says of it, the rest
what its own help says, the form of its JSON last. `arguments(parser)` adds what can be typed, and
`command(options)` runs it and returns what `--json` prints; what it shows otherwise goes through
`terminal.say`. An underscore in the file's name is typed as a hyphen.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORDER = (
    "sites", "passes", "methods", "memory", "print", "diff", "run", "verify", "inspect", "compare",
    "fold", "fold_all", "combine", "check_merge", "merge", "extract", "convert", "export",
    "demo", "search",
)  # fmt: skip
"""In which `peftfx --help` lists them; others come behind, by name."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its module."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__"}
    first = [name for name in ORDER if name in stems]
    for stem in (*first, *sorted(stems - {*first})):
        yield stem.replace("_", "-"), importlib.import_module(f"{__name__}.{stem}")
