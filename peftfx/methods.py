"""What `peftfx methods` shows: every method with its class in the survey, its paper, what it
inserts, what becomes of it, and what it trains on a given model. All of it is read from the
method's own file."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

from .rewriter.api import Program
from .rewriter.errors import RewriteError
from .rewriter.pipeline.method import Method
from .rewriter.pipeline.passes import REGISTRY
from .rewriter.run.run import run


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        name: in pipeline text.
        group: its class in the survey's taxonomy, the folder of its file.
        paper: authors, venue and arXiv number.
        inserts: the first line of its file.
        folds: what becomes of it after training.
        trainable: trained parameters on a given model, None without one or where it is refused.
        refused: why it does not apply to the model as it is.
    """

    name: str
    group: str
    paper: str
    inserts: str
    folds: str
    trainable: int | None = None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


def methods(program: Program | None = None) -> list[Entry]:
    """All methods, by class and name.

    Args:
        program: where to count trained parameters, with each method's defaults.
    """
    entries = [
        _entry(name, cls, program) for name, cls in REGISTRY.items() if issubclass(cls, Method)
    ]
    return sorted(entries, key=lambda e: (e.group, e.name))


def _entry(name: str, cls: type[Method], program: Program | None) -> Entry:
    module = sys.modules[cls.__module__]
    title, citation = split_docstring(module.__doc__ or "")
    group = cls.__module__.rpartition(".")[0].rpartition(".")[2]
    trainable, refused = None, ""
    if program is not None:
        try:
            program_after = run(program, cls())
            trainable = sum(p.numel() for p in program_after.trainable_parameters())
        except RewriteError as error:
            refused = str(error)
    return Entry(name, group, citation, title, cls.folds, trainable, refused)


def split_docstring(text: str) -> tuple[str, str]:
    """What a method inserts (the first sentence, without its name) and its citation."""
    head, _, rest = text.strip().partition("\n\n")
    title = " ".join(head.split()).partition(": ")[2].rstrip(".")
    paper = r"arXiv:\d{4}\.\d{4,5}|doi:10\.\d{4,}/[\w./-]*\w"
    match = re.match(rf"(.*?(?:{paper}))", " ".join(rest.split()))
    return title, match[1] if match else ""
