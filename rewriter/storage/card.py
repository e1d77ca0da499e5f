"""Model cards: the `README.md` beside what is saved, as model hubs show it.

A card says on which base something stands, what was done to it, how large each adapter is, and what
was measured. Its second line marks it as ours: a text without it is someone's own, and stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..program.history import Record
from ..program.state import State

CARD = "README.md"
MARK = "<!-- Written by peftfx. Remove this line to keep a text of your own. -->"

_USE = """```python
program = peftfx.load(model, "THIS FOLDER")  # model: {base}
```"""


def card(
    program: State, names: Sequence[str], base: str = "", use: str = "", root: str = ""
) -> str:
    """The card of adapters, or, without any, of a model that they were put into.

    Args:
        program: which holds them, folded or not.
        names: the adapters that are saved; none for a whole model.
        base: name of the base model, if it has one.
        use: how what is saved is loaded, in Markdown; by default as an artifact.
        root: the sha256 of the base's tensors, if it is known already.
    """
    model = base or type(program.base.module).__name__
    what = ", ".join(names) if names else "merged model"
    tags = ["peftfx", *dict.fromkeys(r.applied.text for r in program.history)]
    every = sum(t.numel() for t in program.base.base_tensors().values())
    return "\n".join([
        "---", *([f"base_model: {base}"] if base else []), "library_name: peftfx",
        "tags:", *(f"- {tag}" for tag in tags), "---", MARK, "", f"# {what}, on {model}", "",
        f"The base has {every:,} parameters and buffers; its tensors' sha256 is "
        f"`{root or program.identity}`.", "",
        *_adapters(program, names),
        "| step | sites | measured when it was done |", "|---|---|---|",
        *(_step(record) for record in program.history), "",
        use or _USE.format(base=f"as {model} was when it was captured"), "",
    ])  # fmt: skip


def _adapters(program: State, names: Sequence[str]) -> Iterable[str]:
    if not names:
        return
    yield from ("| adapter | parameters |", "|---|---|")
    for name in names:
        count = sum(t.numel() for t in program.adapter_tensors(name).values())
        yield f"| `{name}` | {count:,} |"
    yield ""


def _step(record: Record) -> str:
    cells = (f"`{record.text}`", str(len(record.edited)), record.certificate.text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def short_card(what: str, library: str, base: str = "") -> str:
    """The card of an adapter for another library, of which nothing was measured."""
    head = [f"base_model: {base}"] if base else []
    return "\n".join([
        "---", *head, f"library_name: {library}", "tags:", "- peftfx", "---", MARK, "",
        f"# {what}{f', on {base}' if base else ''}", "", f"Written for {library}.", "",
    ])  # fmt: skip


def whole_card(title: str, bases: Sequence[str], said: Sequence[str]) -> str:
    """The card of a model that was made of files.

    Args:
        bases: names of the models that it was made of.
        said: paragraphs: of what it was made, and what was measured.
    """
    return "\n".join([
        "---", *(["base_model:", *(f"- {json.dumps(b)}" for b in bases)] if bases else []),
        "library_name: transformers", "tags:", "- peftfx", "- merge", "---", MARK, "",
        f"# {title}", "", *(line for paragraph in said for line in (paragraph, "")),
    ])  # fmt: skip


def is_ours(folder: str | Path) -> bool:
    """Whether a folder has no card, or one that was written here."""
    path = Path(folder) / CARD
    try:
        return MARK in path.read_text(encoding="utf-8", errors="replace")[:4096]
    except FileNotFoundError:
        return True
    except OSError:
        return False
