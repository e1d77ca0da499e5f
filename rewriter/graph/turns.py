"""Threads take turns where they reason about sizes.

Programs that come from one capture share the symbols of their sizes, and with them torch's fake
mode and shape environment; and while torch traces anything, it looks at what every thread does with
symbols. Neither is made for threads: whoever makes fake values, traces, or computes with symbols is
`alone`. Running programs needs no turn.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_TURN = threading.RLock()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread at a time; a context, or a decorator as `@alone()`."""
    with _TURN:
        yield
