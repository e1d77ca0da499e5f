"""Calls with containers: lists, tuples and dicts of tensors become flat, named tensor inputs.

A template mirrors a container: `{"list": [...]}`, `{"tuple": [...]}` or `{"dict": {...}}`, with
`{"input": name}` for a tensor and `{"constant": value}` for anything baked in. It is plain JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Template = Mapping[str, Any]

_CONSTANTS = bool | int | float | str


def template_of(name: str, item: Any, tensors: dict[str, Tensor]) -> Template:
    """The template of one argument; its tensors are added to `tensors` under flat names.

    Raises:
        TypeError: something in it is neither a tensor, a constant, None nor a plain container;
            the message names it.
    """
    if isinstance(item, Tensor):
        tensors[name] = item
        return {"input": name}
    if item is None or isinstance(item, _CONSTANTS):
        return {"constant": item}
    children = dict(_children(name, item))
    template = {
        key: template_of(f"{name}_{key}", child, tensors) for key, child in children.items()
    }
    if isinstance(item, dict):
        return {"dict": template}
    return {"list" if isinstance(item, list) else "tuple": list(template.values())}


def _children(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    if type(item) in (list, tuple):
        yield from ((str(i), child) for i, child in enumerate(item))
    elif type(item) is dict and all(isinstance(k, str) and k.isidentifier() for k in item):
        yield from item.items()
    else:
        raise TypeError(f"{name!r} is a {type(item).__name__}")


def rebuild(template: Template, tensors: Mapping[str, Tensor]) -> Any:
    """The argument that a template describes, with the given tensors in its places."""
    ((kind, body),) = template.items()
    if kind == "input":
        return tensors[body]
    if kind == "constant":
        return body
    if kind == "dict":
        return {key: rebuild(child, tensors) for key, child in body.items()}
    items = [rebuild(child, tensors) for child in body]
    return items if kind == "list" else tuple(items)


def leaves(template: Template) -> Iterator[str]:
    """The flat names of the tensors in a template."""
    ((kind, body),) = template.items()
    if kind == "input":
        yield body
    elif kind != "constant":
        for child in body.values() if kind == "dict" else body:
            yield from leaves(child)


def differences(want: Template, got: Template) -> Iterator[str]:
    """What keeps a call's template from being the captured one, in words."""
    ((kind, body),) = want.items()
    ((other, size),) = got.items()
    if kind != other:
        yield f"{_word(want)} where {_word(got)} was given"
    elif kind == "input":
        return
    elif kind == "constant":
        if body != size:
            yield f"the constant {body!r} where {size!r} was given"
    elif len(body) != len(size) or (kind == "dict" and set(body) != set(size)):
        yield f"{_word(want)} where {_word(got)} was given"
    else:
        keys: Sequence[Any] = list(body) if kind == "dict" else range(len(body))
        for key in keys:
            yield from differences(body[key], size[key])


def _word(template: Template) -> str:
    ((kind, body),) = template.items()
    if kind == "dict":
        return f"a dict with {', '.join(sorted(body)) or 'no keys'}"
    if kind in ("list", "tuple"):
        return f"a {kind} of {len(body)}"
    return "a tensor" if kind == "input" else f"the constant {body!r}"
