"""The table of what becomes of PEFT's adapters: complete, and right where a sample is tried."""

from __future__ import annotations

import random
import re

import pytest

from peftfx.exporters.hf_peft.adapter import READERS

from .matrix import COLUMNS, ROWS, row, table

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_type_that_is_read_has_a_row() -> None:
    said = table()
    assert said.keys() == ROWS.keys()
    assert {name for label in ROWS for name in re.findall(r"^`(\w+)`", label)} == READERS.keys()
    for cells in said.values():
        assert tuple(cells) == COLUMNS and set(cells.values()) <= {"=", "~", "no"}


def test_a_row_is_what_happens(seed: int) -> None:
    """`python -m tests.formats.matrix` tries, and writes, all."""
    label = random.Random(seed).choice(list(ROWS))
    assert row(label) == table()[label]
