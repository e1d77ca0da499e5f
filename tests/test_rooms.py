"""The rooms of `rewriter/`: each may import from itself and from those before it, nothing else.

Imports inside functions and those for type hints count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "rewriter"

ROOMS = (
    "errors",
    "branches",
    "graph",
    "inputs",
    "files",
    "program",
    "measure",
    "tracing",
    "sites",
    "weights",
    "edits/calls",
    "edits/linear",
    "edits/attention",
    "edits/stream",
    "edits/structure",
    "edits/folding",
    "edits",
    "pipeline",
    "verify",
    "run",
    "training",
    "api",
    "capture",
    "blocks",
    "storage",
    "distributed",
)
"""From the bottom up; ARCHITECTURE.md says what each holds."""

FILES = {path.relative_to(HOUSE).with_suffix("").as_posix(): path for path in HOUSE.rglob("*.py")}
LARGEST = 2500
"""Lines of a room."""


def room(name: str) -> str:
    """The room of a file, given as `edits/linear/compose`."""
    return name.rpartition("/")[0] or name


def imports(name: str) -> Iterator[str]:
    """The files of the house that a file imports."""
    parts = ("rewriter", *name.split("/"))
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        module = (*parts[: -node.level], *(node.module or "").split("."))
        target = "/".join(p for p in module[1:] if p)
        for alias in node.names:
            inner = f"{target}/{alias.name}".lstrip("/")
            yield inner if inner in FILES else target


IMPORTS = {name: {i for i in imports(name) if i != name} for name in FILES}


def test_every_import_is_of_a_file() -> None:
    unknown = {(name, i) for name, targets in IMPORTS.items() for i in targets if i not in FILES}
    assert not unknown


def test_every_folder_is_a_room() -> None:
    assert {room(name) for name in FILES} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_import_goes_up(name: str) -> None:
    own = ROOMS.index(room(name))
    above = sorted(i for i in IMPORTS[name] if ROOMS.index(room(i)) > own)
    assert not above, f"{name} is in a room below {above}: move what they share down"


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(IMPORTS[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in FILES:
        visit(name)


def test_rooms_stay_small() -> None:
    lines: dict[str, int] = dict.fromkeys(ROOMS, 0)
    for name, path in FILES.items():
        lines[room(name)] += len(path.read_text().splitlines())
    assert not {r: n for r, n in lines.items() if n > LARGEST}


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    places = [page.find(f"| `{r}` |") for r in ROOMS]
    assert -1 not in places, f"no row for {ROOMS[places.index(-1)]}"
    assert places == sorted(places), "the rows are in another order than ROOMS"
