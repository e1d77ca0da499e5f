"""Imports every file below `passes/`, so that defining a pass is all it takes to have it, and the
operators that graphs call by name."""

from __future__ import annotations

import importlib
from pathlib import Path

FOLDER = Path(__file__).parent / "passes"


def load_passes() -> None:
    """Imports `kernels/<operator>.py` and `passes/<class>/<method>.py`, in name order."""
    for path in sorted(FOLDER.with_name("kernels").glob("*.py")):
        importlib.import_module(f"{__package__}.kernels.{path.stem}")
    for path in sorted(FOLDER.glob("*/*.py")):
        importlib.import_module(f"{__package__}.passes.{path.parent.name}.{path.stem}")
