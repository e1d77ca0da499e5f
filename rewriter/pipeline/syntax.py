"""Pipelines as text and as YAML.

    pipeline := pass (";" pass)*
    pass     := name [ "{" option "=" value ("," option "=" value)* "}" ]
    value    := number | true | false | none | 'quoted' | [list] | {map} | word
    map      := key "=" value ("," key "=" value)*, with a key of letters, digits and . | : * _ -,
                or 'quoted'

A comma at depth 0 ends a value, so words may hold spaces and `|` (`where=q|v and layer>=6`).
Text is bounded in size, depth and digits, so that reading it never takes long.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from ..errors import ArtifactError, OptionError
from ..files.files import read_file
from .options import KEY
from .passes import Pass, make


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes; `str` gives the text that `parse` reads back."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ";".join(str(p) for p in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)


TEXT_LIMIT = 2**17
"""Longest pipeline or recipe that is read, in characters."""

DEPTH_LIMIT = 32
NODE_LIMIT = 20_000
_DIGITS = 40

CONFIGURATIONS: dict[str, Callable[[Any], Pipeline]] = {}
"""Other libraries, by the name of their package -> what reads their configurations as recipes."""


class Configuration(Protocol):
    """A dataclass that another library configures an adapter with."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Passes = Pass | Pipeline | Configuration | Sequence[Pass | Configuration | str] | str | Path


# Parsing.


def parse(text: str) -> Pipeline:
    """Reads pipeline text.

    Raises:
        OptionError: malformed text, unknown pass or option, wrong value.
    """
    if len(text) > TEXT_LIMIT:
        raise OptionError(f"the pipeline is longer than {TEXT_LIMIT} characters.")
    passes = [_parse_pass(part, text) for part in _split(text, ";") if part.strip()]
    if not passes:
        raise OptionError("the pipeline is empty. Example: 'lora{rank=8,where=q|v};fold'.")
    return Pipeline(tuple(passes))


def _split(text: str, mark: str) -> list[str]:
    """Splits at `mark` outside of brackets and quotes."""
    parts, depth, quoted, start, index = list[str](), 0, False, 0, 0
    while index < len(text):
        char = text[index]
        if quoted:
            if char == "\\":
                index += 1
            elif char == "'":
                quoted = False
        elif char == "'":
            quoted = True
        elif char in "[{(":
            depth += 1
            if depth > DEPTH_LIMIT:
                raise OptionError(f"{_short(text)}: brackets are deeper than {DEPTH_LIMIT}.")
        elif char in "]})":
            depth -= 1
            if depth < 0:
                raise OptionError(f"{_short(text)}: {char!r} closes nothing at position {index}.")
        elif char == mark and depth == 0:
            parts.append(text[start:index])
            start = index + 1
        index += 1
    if depth or quoted:
        raise OptionError(f"{_short(text)}: a {'quote' if quoted else 'bracket'} is not closed.")
    return [*parts, text[start:]]


def _short(text: str, limit: int = 160) -> str:
    """Text for an error message."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _parse_pass(part: str, whole: str) -> Pass:
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\{(.*)\})?\s*", part, re.DOTALL)
    if match is None:
        raise OptionError(
            f"{_short(part.strip())} in {_short(whole)} is not a pass: write name{{option=value}}."
        )
    return make(match[1], _parse_map(match[2] or "", part))


def _parse_map(body: str, where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if not body.strip():
        return options
    for item in _split(body, ","):
        quoted = re.match(r"\s*('(?:[^'\\]|\\.)*')\s*(=)", item, re.DOTALL)
        key, equals, raw = item.partition("=")
        key = key.strip()
        if quoted is not None:
            key, equals, raw = parse_value(quoted[1]), "=", item[quoted.end() :]
        elif not equals or not KEY.fullmatch(key):
            raise OptionError(
                f"{_short(item.strip())} in {_short(where.strip())} is not option=value."
            )
        if key in options:
            raise OptionError(f"option {_short(key)} is given twice in {_short(where.strip())}.")
        options[key] = parse_value(raw)
    return options


def parse_value(raw: str) -> Any:
    """Reads one option value.

    Raises:
        OptionError: malformed list, map or quoted text.
    """
    text = raw.strip()
    if text in ("true", "false"):
        return text == "true"
    if text == "none":
        return None
    if text.startswith("'"):
        if not re.fullmatch(r"'(?:[^'\\]|\\.)*'", text, re.DOTALL):
            raise OptionError(f"{_short(text)} is not one quoted value.")
        return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1]
        return [parse_value(i) for i in _split(inner, ",")] if inner.strip() else []
    if text.startswith("{") and text.endswith("}"):
        return _parse_map(text[1:-1], text)
    if re.fullmatch(r"[-+]?\d+", text, re.ASCII):
        return int(_number(text))
    if re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", text, re.ASCII):
        return float(_number(text))
    if not text:
        raise OptionError("a value is empty; write '' for the empty text.")
    return text


def _number(text: str) -> str:
    if len(text) > _DIGITS:
        raise OptionError(
            f"{_short(text, 50)} is longer than any number here ({_DIGITS} characters)."
        )
    return text


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and endless nesting, and reads 1e-3 as a number."""

    def checked_node(self) -> Any:
        """The document's node, None if it is empty; not too large."""
        node: Any = self.get_single_node()
        if node is not None:
            _measure(node, {}, 0)
        return node

    def get_single_data(self) -> Any:
        node = self.checked_node()
        return None if node is None else self.construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise OptionError(f"duplicate key {key!r} at line {key_node.start_mark.line + 1}.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _measure(node: Any, sizes: dict[int, int], depth: int) -> int:
    """How many values a node stands for, each alias counted as often as it is used.

    Raises:
        OptionError: too many, too deep, or within itself.
    """
    if depth > DEPTH_LIMIT or sizes.get(id(node)) == 0:
        raise OptionError(f"line {node.start_mark.line + 1} is nested deeper than {DEPTH_LIMIT}.")
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = 0  # in progress
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.endswith(":str"):
            _number(node.value)
    else:
        children = (
            node.value if isinstance(node, yaml.SequenceNode) else itertools.chain(*node.value)
        )
        size += sum(_measure(child, sizes, depth + 1) for child in children)
    if size > NODE_LIMIT:
        raise OptionError(f"line {node.start_mark.line + 1} stands for {size} values or more.")
    sizes[id(node)] = size
    return size


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Node:
    """A value of a YAML document, with the line that it stands in (the first is 1).

    `value` is a number, a text, true, false or None; a tuple of nodes; or a dict of nodes by key.
    """

    value: Any
    line: int


def yaml_nodes(text: str, where: str) -> Node:
    """A YAML document whose values know their lines.

    Raises:
        OptionError: malformed YAML, duplicate keys, keys that are no text.
    """
    return _loaded(text, where, lambda loader: _noded(loader, loader.checked_node()))


def _noded(loader: _Loader, node: Any) -> Node:
    if node is None:
        return Node(None, 1)
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return Node(tuple(_noded(loader, child) for child in node.value), line)
    if not isinstance(node, yaml.MappingNode):
        return Node(loader.construct_object(node), line)
    loader.flatten_mapping(node)
    found: dict[str, Node] = {}
    for key, child in node.value:
        name: Any = loader.construct_object(key)
        if not isinstance(name, str) or name in found:
            said = "is given twice" if name in found else "is no text"
            raise OptionError(f"the key {name!r} at line {key.start_mark.line + 1} {said}.")
        found[name] = replace(_noded(loader, child), line=key.start_mark.line + 1)
    return Node(found, line)


def _loaded(text: str, where: str, read: Callable[[_Loader], Any]) -> Any:
    """What `read` makes of a document, whose size and depth are bounded."""
    if len(text) > TEXT_LIMIT:
        raise OptionError(f"{where} is longer than {TEXT_LIMIT} characters.")
    if _deepest(text) > 2 * DEPTH_LIMIT:  # before the reader, which takes long over them
        raise OptionError(f"{where}: brackets are deeper than {DEPTH_LIMIT}.")
    try:
        loader = _Loader(text)
        try:
            return read(loader)
        finally:
            loader.dispose()
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise OptionError(f"{where} is not YAML: {error}") from error
    except RecursionError as error:
        raise OptionError(f"{where} is nested deeper than {DEPTH_LIMIT}.") from error


def parse_yaml(text: str, where: str = "the recipe") -> Pipeline:
    """Reads a recipe: a list (or `passes:` with a list) of names and `name: {option: value}`.

    Raises:
        OptionError: malformed YAML, duplicate keys, unknown passes or options.
    """
    data = _loaded(text, where, lambda loader: loader.get_single_data())
    if isinstance(data, dict) and set(data) == {"passes"}:  # pyright: ignore[reportUnknownArgumentType]
        data = data["passes"]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(data, list) or not data:
        raise OptionError(f"{where} must be a list of passes, such as '- lora: {{rank: 8}}'.")
    passes: list[Pass] = []
    for item in data:  # pyright: ignore[reportUnknownVariableType]
        match item:
            case str():
                passes.extend(parse(item))
            case dict() if len(item) == 1:  # pyright: ignore[reportUnknownArgumentType]
                ((name, options),) = item.items()  # pyright: ignore[reportUnknownVariableType]
                if not isinstance(options, dict | None):
                    raise OptionError(f"{where}: options of {name!r} must be a mapping.")
                passes.append(make(str(name), options or {}))  # pyright: ignore[reportUnknownArgumentType]
            case _:
                raise OptionError(f"{where}: {item!r} is not a pass.")
    return Pipeline(tuple(passes))


def _deepest(text: str) -> int:
    """At most how deep brackets are nested, whether quoted or not."""
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def to_yaml(pipeline: Pipeline) -> str:
    """The recipe form of a pipeline; `parse_yaml` reads it back."""
    return yaml.safe_dump([str(p) for p in pipeline], allow_unicode=True)


def as_pipeline(passes: Passes) -> Pipeline:
    """Normalises everything that `run` takes.

    Raises:
        OptionError: it is none of them, or a recipe cannot be read.
    """
    if isinstance(passes, Pipeline):
        return passes
    if isinstance(passes, Pass):
        return Pipeline((passes,))
    if isinstance(passes, Path) or (
        isinstance(passes, str) and re.search(r"\.ya?ml$", passes.strip())
    ):
        path = Path(passes)
        try:
            text = read_file(path, 4 * TEXT_LIMIT).decode("utf-8")
        except (ArtifactError, UnicodeDecodeError) as error:
            told = str(error) if isinstance(error, ArtifactError) else f"{path} is no text: {error}"
            raise OptionError(f"the recipe {told}") from error
        return parse_yaml(text, str(path))
    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        items: list[Pass] = []
        for item in passes:
            items.extend(as_pipeline(item))
        if not items:
            raise OptionError("the list of passes is empty.")
        return Pipeline(tuple(items))
    packages = [kind.__module__.partition(".")[0] for kind in type(passes).__mro__]
    for package in packages:
        if package in CONFIGURATIONS:
            return CONFIGURATIONS[package](passes)
    libraries = ", ".join(CONFIGURATIONS) or "none"
    raise OptionError(
        f"passes must be a Pass, a list, text, a path or a configuration (of {libraries}), not "
        f"{type(passes).__name__}."
    )
