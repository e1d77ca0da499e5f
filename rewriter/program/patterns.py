"""Regular expressions of selectors, which anybody may have written: those that search fast.

Python's engine tries every way to match, and a repeat within a repeat has exponentially many. What
is left, repeats behind each other, has as many as the product of their lengths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from re import _parser  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from typing import Any

LENGTH_LIMIT = 200
"""Longest pattern, in characters."""

_NAME = 64
"""Characters that an unbounded repeat is counted as."""

_WAYS = (_NAME + 1) ** 4
"""The most ways to match that are searched: three unbounded repeats, from any first character."""

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def search_pattern(text: str) -> re.Pattern[str]:
    """Compiles a pattern that searches a module's name in a time that nobody notices.

    Raises:
        ValueError: (re.error) it is malformed, too long, or may search for very long.
    """
    if len(text) > LENGTH_LIMIT:
        raise ValueError(f"it is longer than {LENGTH_LIMIT} characters")
    try:
        compiled, parsed = re.compile(text), _parser.parse(text)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if _ways(parsed, False) * (_NAME + 1) > _WAYS:
        raise ValueError(
            "its repeats and choices can be matched in too many ways; leave some out, or join "
            "shorter ones with 'and', 'or'"
        )
    return compiled


def _ways(parsed: Any, repeated: bool) -> int:
    """In how many ways a sequence can match, at most."""
    ways = 1
    for operator, argument in parsed:
        name = str(operator)
        if name.startswith("GROUPREF"):
            raise ValueError("it refers back to a group, which names need not")
        is_repeat = name in _REPEATS
        if repeated and (is_repeat or name == "BRANCH"):
            raise ValueError(
                "a repeat holds another repeat or a choice, which can take for ever; repeat "
                "single characters and sets only, such as [ab]+"
            )
        if is_repeat:
            least, most, _ = argument
            ways *= min(int(most), _NAME) - min(int(least), _NAME) + 1
        inside = repeated or (is_repeat and int(argument[1]) > 1)
        parts = [_ways(part, inside) for part in _parts(argument)]
        ways *= sum(parts) if name == "BRANCH" else max(parts, default=1)
        if ways > _WAYS:
            return ways
    return ways


def _parts(argument: Any) -> Iterator[Any]:
    """The sequences within an operator's argument."""
    if isinstance(argument, _parser.SubPattern):  # pyright: ignore[reportUnknownMemberType]
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:  # pyright: ignore[reportUnknownVariableType]
            yield from _parts(item)
