"""Files damaged on purpose: altered by hand (with the right seal), cut, or with one bit flipped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftfx.rewriter.files.sealed import SEAL, sealed


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edits a JSON file; a manifest that holds a hash of itself gets the right one."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or SEAL not in data:
        edit(data)
        path.write_text(json.dumps(data))
        return
    data.pop(SEAL)
    edit(data)
    path.write_bytes(sealed(data))


def flips(good: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Copies with one bit flipped each."""
    draw = random.Random(seed)
    for _ in range(count):
        bad, bit = bytearray(good), draw.randrange(len(good) * 8)
        bad[bit // 8] ^= 1 << (bit % 8)
        yield bytes(bad)


def cuts(good: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Beginnings, each of another length."""
    draw = random.Random(seed)
    yield from (good[: draw.randrange(len(good))] for _ in range(count))
