"""Pipelines as text and as YAML.

    pipeline := pass (";" pass)*
    pass     := name [ "{" option "=" value ("," option "=" value)* "}" ]
    value    := number | true | false | none | 'quoted' | [list] | {map} | word

A comma at depth 0 ends a value, so words may hold spaces and `|` (`where=q|v and layer>=6`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError
from .passes import Pass, make


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes; `str` gives the text that `parse` reads back."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ";".join(str(p) for p in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)


Passes = Pass | Pipeline | Sequence[Pass | str] | str | Path


# Parsing.


def parse(text: str) -> Pipeline:
    """Reads pipeline text.

    Raises:
        OptionError: malformed text, unknown pass or option, wrong value.
    """
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
        elif char in "]})":
            depth -= 1
            if depth < 0:
                raise OptionError(f"{text!r}: {char!r} closes nothing at position {index}.")
        elif char == mark and depth == 0:
            parts.append(text[start:index])
            start = index + 1
        index += 1
    if depth or quoted:
        raise OptionError(f"{text!r}: a {'quote' if quoted else 'bracket'} is not closed.")
    return [*parts, text[start:]]


def _parse_pass(part: str, whole: str) -> Pass:
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\{(.*)\})?\s*", part, re.DOTALL)
    if match is None:
        raise OptionError(
            f"{part.strip()!r} in {whole!r} is not a pass: write name{{option=value}}."
        )
    return make(match[1], _parse_map(match[2] or "", part))


def _parse_map(body: str, where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if not body.strip():
        return options
    for item in _split(body, ","):
        key, equals, raw = item.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"\w+", key):
            raise OptionError(f"{item.strip()!r} in {where.strip()!r} is not option=value.")
        if key in options:
            raise OptionError(f"option {key!r} is given twice in {where.strip()!r}.")
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
            raise OptionError(f"{text!r} is not one quoted value.")
        return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1]
        return [parse_value(i) for i in _split(inner, ",")] if inner.strip() else []
    if text.startswith("{") and text.endswith("}"):
        return _parse_map(text[1:-1], text)
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    if not text:
        raise OptionError("a value is empty; write '' for the empty text.")
    return text


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and reads 1e-3 as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise OptionError(f"duplicate key {key!r} at line {key_node.start_mark.line + 1}.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str = "the recipe") -> Pipeline:
    """Reads a recipe: a list (or `passes:` with a list) of names and `name: {option: value}`.

    Raises:
        OptionError: malformed YAML, duplicate keys, unknown passes or options.
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise OptionError(f"{where} is not YAML: {error}") from error
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
            return parse_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"the recipe {path} cannot be read: {error}.") from error
    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        found: list[Pass] = []
        for item in passes:
            found.extend(as_pipeline(item))
        if not found:
            raise OptionError("the list of passes is empty.")
        return Pipeline(tuple(found))
    raise OptionError(
        f"passes must be a Pass, a list, text or a path, not {type(passes).__name__}."
    )
