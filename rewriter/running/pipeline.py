"""Pipelines: ordered passes, as Python, as text and as YAML; running, parsing, replaying.

    pipeline := pass (";" pass)*
    pass     := name [ "{" option "=" value ("," option "=" value)* "}" ]
    value    := number | true | false | none | 'quoted' | [list] | {map} | word

A comma at depth 0 ends a value, so words may hold spaces and `|` (`where=q|v and layer>=6`).
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..aten import set_attribute
from ..edits.edit import Editor
from ..errors import OptionError, PassError, RewriteError
from ..program import BRANCHES, Program, Record
from ..sharded import placed_like, require_whole, whole
from .passes import Pass, Plan, make
from .propagate import propagate
from .verify import Certificate, certify, check_graph


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


# Running.


def run(
    program: Program,
    passes: Passes,
    *,
    data: Any = None,
    sources: Sequence[Any] = (),
    progress: Callable[[str], None] | None = None,
) -> Program:
    """Applies passes to a copy of `program`; the argument is never changed.

    Args:
        program: what to rewrite.
        passes: a Pass, a list of them, text such as `"lora{rank=8,where=q|v};fold"`, or the path
            of a YAML recipe.
        data, sources: handed to each pass's `plan`.
        progress: called with each pass's text before it runs.

    Returns:
        The rewritten program, verified; its `history` has one record a pass.

    Raises:
        RewriteError: the first pass that fails; nothing is changed.
    """
    if not isinstance(program, Program):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PassError(
            f"run takes a Program, not {type(program).__name__}; capture the model first."
        )
    done: list[str] = []
    for item in as_pipeline(passes):
        if progress is not None:
            progress(str(item))
        try:
            if not item.sharded:
                require_whole(program.module, item.text)
            started = time.perf_counter()
            plan = item.plan(program, data, sources)
            planned = time.perf_counter() - started
            program = apply_plan(program, item, plan, planned)
        except RewriteError as error:
            after = f" after {', '.join(done)}" if done else ""
            error.add_note(f"while running {item}{after}")
            raise
        done.append(str(item))
    return program


def apply_plan(
    program: Program, item: Pass, plan: Plan, planned: float = 0.0, check: bool = True
) -> Program:
    """Applies one planned pass transactionally: fork, edit, propagate, check, record."""
    if item.adapter is not None and item.adapter in program.adapters:
        raise PassError(
            f"there is an adapter {item.adapter!r} already; give this one another name: "
            f"{item.text}{{name=...}}."
        )
    clock = [time.perf_counter()]
    fork = program.fork()
    clock.append(time.perf_counter())
    edit = Editor(fork, item.adapter, getattr(item, "seed", 0), plan.decisions)
    if item.adapter is not None:
        edit.freeze(keep={n for names in program.owned.values() for n in names})
    item.apply(edit, plan)
    if item.adapter is not None and not edit.edited:
        site, reason = edit.skipped[0] if edit.skipped else ("", "there is no site")
        raise PassError(
            f"{item}: none of the selected sites could be edited, first {site}: {reason}. Choose "
            "others with where=."
        )
    edit.finish()
    clock.append(time.perf_counter())
    after = edit.program
    certificate = Certificate("unchecked")
    propagate(after)
    if check:
        check_graph(after)
        certificate = certify(item.promise(), program, after)
        certificate = replace(certificate, measured={**certificate.measured, **edit.figures})
    clock.append(time.perf_counter())
    spans = (b - a for a, b in itertools.pairwise(clock))
    seconds = dict(zip(("fork", "edit", "check"), spans, strict=True)) | {"plan": planned}
    edited = tuple(dict.fromkeys(edit.edited))
    record = Record(
        str(item),
        item.adapter,
        edited,
        tuple(edit.skipped),
        certificate,
        seconds,
        item,
        replace(plan, decisions=edit.decided),
    )
    return replace(after, history=(*program.history, record))


def replay_steps(
    program: Program, adapters: Sequence[str] | None = None
) -> Iterator[tuple[Record, Program, Program]]:
    """Rebuilds a program from its base, step by step, with its current values.

    Yields (record, before, after); `after` of an inserting pass holds freshly initialised
    branches as far as its certificate goes, and the current values from the next step on.
    """
    names = program.adapters if adapters is None else tuple(adapters)
    current = program.base
    steps = [(r, p) for r in program.history if (p := _kept(r, names)) is not None]
    for index, (record, plan) in enumerate(steps):
        before = current
        current = apply_plan(current, record.applied, plan, check=False)
        kept = replace(current.history[-1], certificate=record.certificate)
        current.history = (*current.history[:-1], kept)
        yield record, before, current
        reshaped = any(r.applied.reshapes for r, _ in steps[index + 1 :])
        for name in current.adapters:
            load_values(current, program.adapter_tensors(name), reshaped)


def _kept(record: Record, names: Sequence[str]) -> Plan | None:
    """A record's plan for the given adapters alone; None if it has nothing to do for them."""
    plan = record.plan
    if record.adapter is not None and record.adapter not in names:
        return None
    paths = plan.decisions.get("branches")
    if not paths:
        return plan
    kept = [p for p in paths if p.split(".")[1] in names]
    if not kept:
        return None
    of_them = {p: paths[p] for p in kept} if isinstance(paths, Mapping) else kept
    return replace(plan, decisions={**plan.decisions, "branches": of_them})


def replay(program: Program, adapters: Sequence[str]) -> Program:
    """The program with only the given adapters, rebuilt from its base without random choices."""
    current = program.base.fork()
    for _, _, after in replay_steps(program, adapters):
        current = after
    current.module.train(program.training)
    return current


def load_values(
    program: Program, tensors: Mapping[str, torch.Tensor], reshaped: bool = False
) -> None:
    """Copies values into a program's own branch and trained base tensors, by name.

    Where a tensor has no storage yet (meta device), it gets that of the value. With `reshaped`,
    a later pass gives tensors the shape that their values have: those are left for then.
    """
    held = dict(program.module.named_parameters()) | dict(program.module.named_buffers())
    owned = {n for names in program.owned.values() for n in names}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in held and (name.startswith(f"{BRANCHES}.") or name in owned):
                own = held[name]
                if reshaped and own.shape != tensor.shape:
                    continue
                if not own.is_meta or tensor.is_meta:
                    own.copy_(placed_like(whole(tensor), own))
                elif isinstance(own, nn.Parameter):
                    set_attribute(
                        program.module, name, nn.Parameter(tensor.clone(), own.requires_grad)
                    )
                else:
                    set_attribute(program.module, name, tensor.clone())
