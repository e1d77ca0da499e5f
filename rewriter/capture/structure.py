"""Structures of inputs and outputs as text and back, without importing what the text names.

The text is that of `torch.utils._pytree.treespec_dumps`. Its own reader imports modules whose names
stand in the text (for defaultdicts, named tuples, enumerations), so files are not read with it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from torch.utils import _pytree as pytree

_SEQUENCES: dict[str, type[Any]] = {"builtins.tuple": tuple, "builtins.list": list}
_MAPPINGS: dict[str, type[Any]] = {
    "builtins.dict": dict, "collections.OrderedDict": OrderedDict,
}  # fmt: skip
_NODES = 100_000


def read_structure(text: Any, classes: Collection[str] = ()) -> pytree.TreeSpec:
    """Reads a written structure: tuples, lists, dicts, and classes whose parts have names.

    Args:
        text: as written.
        classes: names of the classes that it may hold; they must be registered with torch.

    Raises:
        ValueError, LookupError, TypeError: it is malformed, or holds something else.
    """
    if not isinstance(text, str) or len(text) > 2**24:
        raise ValueError("a structure is no text")
    try:
        version, spec = json.loads(text)
        if version != 1:
            raise ValueError(f"a structure is of version {version!r}")
        structure = _structure(spec, classes)
    except RecursionError as error:
        raise ValueError("a structure is nested too deeply") from error
    if structure.num_nodes > _NODES:
        raise ValueError(f"a structure has {structure.num_nodes} parts")
    return structure


def _structure(spec: Any, classes: Collection[str]) -> pytree.TreeSpec:
    kind, context, children = spec["type"], spec["context"], spec["children_spec"]
    if kind is None and context is None and children == []:
        return pytree.tree_structure(0)
    if not isinstance(kind, str) or not isinstance(context, str):
        raise TypeError("a part of a structure has no type")
    inner = [_structure(child, classes) for child in children]
    about: Any = json.loads(context)
    if kind in _SEQUENCES:
        if about is not None:
            raise ValueError(f"a {kind} has names")
        return pytree.TreeSpec(_SEQUENCES[kind], None, inner)
    named = _names(about, len(inner), kind)
    if kind in _MAPPINGS:
        return pytree.TreeSpec(_MAPPINGS[kind], named, inner)
    if kind not in classes:
        raise ValueError(f"a structure holds a {kind!r}")
    return pytree.TreeSpec(pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[kind], named, inner)


def _names(about: Any, count: int, kind: Any) -> list[Any]:
    keys: list[Any] = about if isinstance(about, list) else []
    plain = all(type(k) in (str, int) for k in keys)
    if not plain or len(keys) != count or len(set(keys)) != count:
        raise ValueError(f"a {kind!r} has {count} parts, but not as many names")
    return keys
