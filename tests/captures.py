"""Captures of the test models, kept between runs and shared by the processes of one.

They lie in a folder named by a hash of the code that captures, so that none is older than that code;
the folders of other versions are removed. What captures as such is tested without.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from peftfx.rewriter.capture.cache import own_digest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".pytest_cache" / "captures"


@functools.cache
def captures() -> Path:
    """The folder that `capture(cache=...)` is given."""
    folder = FOLDER / own_digest()[:16]
    if not folder.exists():
        shutil.rmtree(FOLDER, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    return folder
