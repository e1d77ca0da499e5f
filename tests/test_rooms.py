"""The rooms of `rewriter/`: each may import from itself and from those before it, nothing else."""

from __future__ import annotations

import pytest

from .rooms import FILES, IMPORTS, PICTURE, ROOMS, ROOT, lines, picture, room

LARGEST = 2500
"""Lines of a room."""


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
    assert not {name: n for name in ROOMS if (n := lines(name)) > LARGEST}


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    places = [page.find(f"| `{name}` |") for name in ROOMS]
    assert -1 not in places, f"no row for {ROOMS[places.index(-1)]}"
    assert places == sorted(places), "the rows are in another order than ROOMS"


def test_the_picture_shows_the_rooms_in_their_order() -> None:
    """Counts change with every import; which rooms there are, and who imports whom, does not."""
    drawn, now = PICTURE.read_text(), picture()
    names = [f">{name}</text>" for name in ROOMS]
    assert all(name in drawn for name in names) and drawn.count("<rect") == now.count("<rect"), (
        "run `python -m tests.rooms`"
    )
