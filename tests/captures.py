"""Captures of the test models, kept between runs and shared by the processes of one.

They lie in a folder named by a hash of the code that captures (`rewriter/`), so that none is older
than that code; the folders of other versions are removed. What captures as such is tested without.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".pytest_cache" / "captures"


@functools.cache
def captures() -> Path:
    """The folder that `capture(cache=...)` is given."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "rewriter").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    folder = FOLDER / digest.hexdigest()[:16]
    if not folder.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    return folder
