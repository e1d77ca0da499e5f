"""Pairs of (what a function does, its source) from a tree of Python files, and how they are split.

A pair is the first paragraph of a function's docstring and the function's source without that
docstring. Everything is a function of the files and a seed: files are read in sorted order, equal
texts are kept once, and test files are left out.

Splits are disjoint by top-level module, so that no function, class or neighbour of a held-out
function was seen in training. The test and validation modules of the splits do not overlap each
other either: a setting chosen on a validation set has never met any test function.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..rewriter.errors import RewriteError

MIN_WORDS = 3
"""Shorter descriptions ("Constructor.") say too little to search for."""
MIN_LINES = 3
"""Shorter sources (a `def` and one statement) mostly delegate: their name is all they say."""
MIN_PAIRS = 120
"""Below this there is nothing to train on and nothing to measure with."""
MIN_GROUPS = 7
"""Three test sets, three validation sets and something to train on."""

TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "testing"})
OTHER_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "node_modules", "build", "dist", "venv"}
)


class CorpusError(RewriteError, ValueError):
    """A source tree cannot be used: it is missing, or holds too few documented functions."""


@dataclass(frozen=True)
class Pair:
    """One function.

    Attributes:
        module: dotted name of its module, relative to the source tree.
        name: qualified name inside the module (`Class.method`).
        line: line of its `def` in the file.
        query: first paragraph of its docstring, on one line.
        code: its source without decorators and docstring, dedented.
    """

    module: str
    name: str
    line: int
    query: str
    code: str

    @property
    def title(self) -> str:
        """`module.Class.method`."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Corpus:
    """The pairs of one source tree.

    Attributes:
        root: the folder that was read.
        pairs: in the order of file path and line.
        files: how many files were read.
        skipped: (path, reason) of the files that could not be read or parsed.
        duplicates: how many functions were dropped because an earlier one has the same text.
        unusable: how many functions have no docstring, or too short a one or too short a source.
    """

    root: Path
    pairs: tuple[Pair, ...]
    files: int
    skipped: tuple[tuple[str, str], ...]
    duplicates: int
    unusable: int


@dataclass(frozen=True)
class Split:
    """One division of a corpus; the three parts share no top-level module."""

    seed: int
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _is_test(name: str) -> bool:
    return name.startswith("test_") or name.endswith("_test.py") or name == "conftest.py"


def python_files(root: Path) -> Iterator[Path]:
    """Every Python file below `root` that is no test, in sorted order; links are not followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            f
            for f in folders
            if f not in TEST_FOLDERS and f not in OTHER_FOLDERS and not f.startswith(".")
        )
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(".py") and not _is_test(name) and not path.is_symlink():
                yield path


def first_paragraph(docstring: str) -> str:
    """The docstring's first paragraph as one line; empty if it is a doctest or has no prose."""
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    text = " ".join(paragraph.split())
    return "" if text.startswith(">>>") or len(text.split()) < MIN_WORDS else text


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods; functions inside functions belong to the outer one's source."""
    for node in body:
        if isinstance(node, Function):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            parts = [node.body, node.orelse]
            parts += (
                [handler.body for handler in node.handlers] if isinstance(node, ast.Try) else []
            )
            for part in parts:
                yield from _functions(part, prefix)


def source_without_docstring(lines: Sequence[bytes], node: Function) -> str:
    """The function's text, dedented, with its docstring cut out (and nothing else changed)."""
    start, end = node.lineno - 1, node.end_lineno or node.lineno
    doc = node.body[0]
    first, last = doc.lineno - 1, (doc.end_lineno or doc.lineno) - 1
    head = lines[first][: doc.col_offset]
    tail = lines[last][doc.end_col_offset or 0 :].lstrip(b" ;")
    middle = head + tail if head.strip() or tail.strip() else b""
    kept = [*lines[start:first], middle, *lines[last + 1 : end]]
    text = textwrap.dedent(b"".join(kept).decode("utf-8"))
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def functions_of(text: str, module: str) -> Iterator[Pair | None]:
    """Pairs of one file's text; None for a function without enough text on either side.

    Raises:
        SyntaxError, ValueError, RecursionError: the text does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    lines = text.encode("utf-8").splitlines(keepends=True)
    for name, node in _functions(tree.body):
        docstring = ast.get_docstring(node, clean=False)
        query = first_paragraph(docstring) if docstring else ""
        code = source_without_docstring(lines, node) if query else ""
        usable = len(node.body) > 1 and code.count("\n") + 1 >= MIN_LINES
        yield Pair(module, name, node.lineno, query, code) if query and usable else None


def module_name(path: Path, root: Path) -> str:
    """`a/b/__init__.py` -> `a.b`."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def read_corpus(source: str | os.PathLike[str] | None = None) -> Corpus:
    """Reads a source tree (default: the running interpreter's standard library).

    Raises:
        CorpusError: no such folder, no Python files, or no documented functions.
    """
    root = standard_library() if source is None else Path(source).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise CorpusError(f"{root} {what}. Give a folder of Python files: --source DIR.")
    seen: set[str] = set()
    pairs: list[Pair] = []
    skipped: list[tuple[str, str]] = []
    files = duplicates = unusable = 0
    for path in python_files(root):
        files += 1
        try:
            with tokenize.open(path) as file:
                text = file.read()
            functions = list(functions_of(text, module_name(path, root)))
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            skipped.append((str(path.relative_to(root)), f"{type(error).__name__}: {reason}"))
            continue
        for pair in functions:
            if pair is None:
                unusable += 1
                continue
            keys = {"q" + pair.query.lower(), "c" + " ".join(pair.code.split())}
            if keys & seen:
                duplicates += 1
                continue
            seen |= keys
            pairs.append(pair)
    if not pairs:
        note = f" {len(skipped)} files could not be read or parsed." if skipped else ""
        what = f"none of its {files} Python files has" if files else "it holds no Python files with"
        raise CorpusError(
            f"nothing to search in {root}: {what} a function with a docstring of "
            f"{MIN_WORDS} words and {MIN_LINES} lines of source or more (tests are left "
            f"out).{note} Give another folder."
        )
    return Corpus(root, tuple(pairs), files, tuple(skipped), duplicates, unusable)


def groups_of(pairs: Sequence[Pair]) -> list[str]:
    """The group of each pair: its top-level module.

    Where nearly everything lies below one package (a project's usual layout), the common packages
    are stripped first; where even that leaves too few groups, a group is a file.
    """
    names = [p.module.split(".") for p in pairs]
    depth = 0
    while len({n[depth] for n in names if len(n) > depth}) == 1 and all(
        len(n) > depth + 1 for n in names
    ):
        depth += 1
    groups = [n[depth] for n in names]
    if max(Counter(groups).values()) > len(pairs) // 2 or len(set(groups)) < 2 * MIN_GROUPS:
        return [p.module for p in pairs]
    return groups


def make_splits(
    corpus: Corpus, seed: int = 0, count: int = 3, test: int = 500, validation: int = 250
) -> list[Split]:
    """Divides a corpus `count` times; see the module's text for what is disjoint from what.

    Modules are drawn in a seeded random order. A module with more functions than half a test set
    stays in training, where all of it is of use. Small corpora get smaller sets: a test set is at
    most one ninth of the pairs.

    Args:
        corpus: where the pairs come from.
        seed: seeds the order of modules and of pairs.
        count: number of splits.
        test: size of each test set (of its queries, and of the functions searched).
        validation: size of each validation set.

    Raises:
        CorpusError: too few pairs, or too few modules to keep them apart.
    """
    total = len(corpus.pairs)
    groups = groups_of(corpus.pairs)
    order = sorted(set(groups))
    if total < MIN_PAIRS or len(order) < MIN_GROUPS:
        raise CorpusError(
            f"{corpus.root} is too small: {total} documented functions in {len(order)} modules, "
            f"but at least {MIN_PAIRS} in {MIN_GROUPS} are needed to train on some modules and "
            "measure on others. Give a larger folder."
        )
    test, validation = min(test, total // 9), min(validation, total // 18)
    generator = random.Random(seed)
    generator.shuffle(order)
    members: dict[str, list[Pair]] = {name: [] for name in order}
    for pair, group in zip(corpus.pairs, groups, strict=True):
        members[group].append(pair)
    queue = [name for name in order if len(members[name]) <= max(test // 2, 1)]

    def draw(size: int) -> tuple[Pair, ...]:
        taken: list[Pair] = []
        while len(taken) < size and queue:
            taken += members.pop(queue.pop(0))
        if len(taken) < size:
            raise CorpusError(
                f"the functions of {corpus.root} lie in too few modules to hold {size} of them "
                "out for each test. Give a folder with more modules."
            )
        generator.shuffle(taken)
        return tuple(taken[:size])

    tests = [draw(test) for _ in range(count)]
    validations = [draw(validation) for _ in range(count)]
    rest = [pair for name in order if name in members for pair in members[name]]
    splits: list[Split] = []
    for index in range(count):
        train = list(rest)
        random.Random(1000 * (seed + 1) + index).shuffle(train)
        splits.append(Split(seed + index, tuple(train), validations[index], tests[index]))
    return splits
