"""Folders that last as long as the process: what is made once for many tests, where no fixture can be."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

_made: list[Path] = []


def lasting(prefix: str, under: Path | None = None) -> Path:
    """A new folder in the system's place for such, or in `under`, which is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=under))
    _made.append(folder)
    return folder


@atexit.register
def remove() -> None:
    """Removes them all; at the end of a test session, too, whose workers do not end as others do."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
