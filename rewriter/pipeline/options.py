"""Option values of passes: what fits a declared type, and how they are written as text.

An option that is declared `BySite[int]` takes an int, or a map from selectors to ints, see
`by_site.py`.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

BySite = Annotated[T, "by site"]
"""One value for all sites, or a map from selectors to values, which `Pass.at_site` resolves: where
site is at hand, methods read the one value."""

DEFAULT = "default"
"""The key of such a map for what no selector of it matches."""

KEY = re.compile(r"[\w.|:*-]+")
"""A key of a map that needs no quotes."""


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Declared types of a pass's options, `BySite` with them."""
    return get_type_hints(cls, include_extras=True)


def is_by_site(hint: Any) -> bool:
    """Whether an option may have a value for each site."""
    return get_origin(hint) is Annotated


def adapt(item: Any, hint: Any) -> Any:
    """Lists become tuples, whole numbers floats, and one word a tuple of one, where declared."""
    if is_by_site(hint):
        inner = get_args(hint)[0]
        each: Any = item if isinstance(item, Mapping) else None
        return adapt(item, inner) if each is None else {k: adapt(v, inner) for k, v in each.items()}
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(item, list):
            inner = get_args(kind)[0]
            return tuple(adapt(i, inner) for i in item)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if get_origin(kind) is tuple and isinstance(item, str):
            return (item,)
    if float in kinds and int not in kinds and type(item) is int:
        return float(item)
    return item


def fits(got: Any, hint: Any) -> bool:
    """Whether a value is of a declared type; numbers are not converted."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner = get_args(hint)[0]
        return fits(got, dict[str, inner]) and bool(got) if type(got) is dict else fits(got, inner)
    if origin in (Union, types.UnionType):
        return any(fits(got, h) for h in get_args(hint))
    if origin is dict:
        kinds = get_args(hint)
        return isinstance(got, dict) and all(
            fits(k, kinds[0]) and fits(v, kinds[1])
            for k, v in got.items()  # pyright: ignore[reportUnknownVariableType]
        )
    if origin is tuple:
        inner = get_args(hint)
        if not isinstance(got, tuple):
            return False
        kinds = inner[:1] * len(got) if inner[-1] is Ellipsis else inner  # pyright: ignore[reportUnknownArgumentType]
        return len(kinds) == len(got) and all(map(fits, got, kinds))  # pyright: ignore[reportUnknownArgumentType]
    if origin is not None and origin.__name__ == "Literal":
        return got in get_args(hint)
    if hint is float:
        return type(got) in (int, float)
    if hint is int:
        return type(got) is int and abs(got) < 2**63
    return isinstance(got, hint)


def type_name(hint: Any) -> str:
    """A declared type in the words of an error message."""
    if is_by_site(hint):
        return f"{type_name(get_args(hint)[0])}, or a map from selectors to it"
    if hint is int:
        return "int (of at most 64 bits)"
    if get_origin(hint) is not None and getattr(get_origin(hint), "__name__", "") == "Literal":
        return "one of " + ", ".join(str(a) for a in get_args(hint))
    return str(getattr(hint, "__name__", hint)).replace("typing.", "")


def write_value(item: Any) -> str:
    """An option value as pipeline text; `syntax.parse` reads it back."""
    if item is None:
        return "none"
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, tuple | list):
        return f"[{','.join(write_value(i) for i in item)}]"  # pyright: ignore[reportUnknownVariableType]
    if isinstance(item, Mapping):
        return "{" + ",".join(f"{_key(k)}={write_value(v)}" for k, v in item.items()) + "}"  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    text = str(item)
    balanced = re.sub(r"[^()]", "", text)
    while "()" in balanced:
        balanced = balanced.replace("()", "")
    plain = not balanced and re.fullmatch(r"[^\s,;{}\[\]'\"=\\][^,;{}\[\]'\"\\]*", text)
    number = re.fullmatch(r"[-+]?(\d|\.\d|inf|nan).*", text, re.IGNORECASE)
    if plain and not number and text not in ("true", "false", "none") and text == text.strip():
        return text
    return _quoted(text)


def _key(key: Any) -> str:
    return key if KEY.fullmatch(str(key)) else _quoted(str(key))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
