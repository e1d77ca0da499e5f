"""List the passes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..rewriter.pipeline.passes import REGISTRY
from ..terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be typed."""


def command(options: Any) -> Any:
    """Runs the command."""
    listed: dict[str, str] = {}
    for name, cls in sorted(REGISTRY.items()):
        listed[name] = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
        say(options, f"{name:16}{listed[name]}")
    return listed
