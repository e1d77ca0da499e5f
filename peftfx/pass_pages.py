"""What there is to say of a pass, read from its own file: options, promise, source."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from .methods import split_docstring
from .rewriter.pipeline.options import hints_of, type_name, write_value
from .rewriter.pipeline.passes import Pass


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: in pipeline text.
        type: of its values.
        default: as text; '' where it must be given.
        meaning: a sentence.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Page:
    """One pass.

    Attributes:
        name: in pipeline text.
        about: what it does.
        contract: what it promises about the outputs.
        folds: what becomes of it after training; '' for other passes than methods.
        source: paper, from its file.
        file: of the pass.
        options: in the order of its file.
        example: pipeline text.
    """

    name: str
    about: str
    contract: str
    folds: str
    source: str
    file: str
    options: tuple[Option, ...]
    example: str

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


_LAST = ("where", "name", "seed")
_NOTHING = ("", "none", "false", "''")
_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")

_PROMISES = {
    "identity": "outputs stay as they are, bit for bit, until something trains",
    "exact": "outputs stay as they are, bit for bit",
    "bounded": "outputs stay as they are, up to rounding",
    "near": "outputs stay close to what they are, within a stated limit",
    "trainable": "outputs change; what trains is in the record",
}
"""Kinds of `Contract` in words."""


def _type(hint: Any) -> str:
    """A declared type, as users say it."""
    words = type_name(hint).replace(" (of at most 64 bits)", "").replace(" | None", " or none")
    return {"str": "text", "bool": "true or false"}.get(words, words.replace("str", "text"))


def page(cls: type[Pass]) -> Page:
    """What a pass's file says of it."""
    text = (sys.modules[cls.__module__].__doc__ or "").strip()
    about = " ".join(text.partition("\n\n")[0].split())
    source = split_docstring(text)[1] or ", ".join(dict.fromkeys(_PAPER.findall(text)))
    hints, meanings = hints_of(cls), meanings_of(cls)
    options = tuple(
        Option(f.name, _type(hints[f.name]), _default(f), meanings.get(f.name, ""))
        for f in sorted(fields(cls), key=lambda f: _LAST.index(f.name) if f.name in _LAST else -1)
    )
    shown = [f"{o.name}={o.default}" for o in options if o.default not in _NOTHING]
    example = f"{cls.text}{{{','.join(shown[:2])}}}" if shown else cls.text
    file = "/".join(cls.__module__.removeprefix("peftfx.").split(".")) + ".py"
    contract = f"{cls.contract.kind}: {_PROMISES[cls.contract.kind]}"
    folds = getattr(cls, "folds", "")
    return Page(cls.text, about, contract, folds, source, file, options, example)


def _default(field: Any) -> str:
    return "" if field.default is MISSING else write_value(field.default)


def meanings_of(cls: type) -> dict[str, str]:
    """Option -> what the docstrings of a class and of those above it say of it."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        text = inspect.cleandoc(one.__dict__.get("__doc__") or "")
        for section in re.findall(r"^Attributes:\n((?:    .*\n?|\n)*)", text, re.MULTILINE):
            entry = r"^    ([\w, ]+): ((?:.*\n?(?:^     +.*\n?)*))"
            for names, meaning in re.findall(entry, section, re.MULTILINE):
                for name in names.split(","):
                    found[name.strip()] = " ".join(meaning.split())
    return found
