"""`docs/command-line.md`, written from the parsers: `python -m tests.command_line`."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftfx.cli import CODES, details, parser
from peftfx.commands import commands

PAGE = Path(__file__).parent.parent / "docs" / "command-line.md"

_HEAD = """# The command line

<!-- Written by `python -m tests.command_line`; do not edit. -->

`peftfx COMMAND --help` says what a command takes. What is typed is looked at before a model is loaded: options, pipeline
text, selectors, adapters that are not there, and whether the output can be written. A word that is not known is an error
that names the nearest.

`MODEL` is a Hugging Face directory, a GGUF file, or `module:function` that returns a model and example inputs. An adapter
may be of any format that is read; its files tell which. On a terminal tables fit its width; in a pipe each row is one
line. `--json` prints one JSON document on stdout and nothing else there.

## Exit codes

An error is one line on stderr. With `--json` it is `{"error": text, "kind": kind, "code": exit code}`, with what was found
all the same, if there is something.

| code | kind | what happened |
|---|---|---|
| 0 | | it is done |
"""

_MEANINGS = {
    "contract": "a promise was measured and is broken: outputs differ, a merge is not what it should be",
    "usage": "what was asked for is not possible: a wrong word, a file that is not there, a model or pass that does not fit",
    "base": "the adapter or the checkpoint belongs to another base",
    "damage": "a file is damaged, altered, or not understood",
    "system": "the system refuses: disk full, no permission, not enough memory, another rank failed",
    "internal": "a fault of peftfx; the traceback says where",
    "interrupted": "interrupted by Ctrl-C; nothing is half written",
}


def page() -> str:
    """The whole text."""
    lines = [_HEAD.rstrip("\n")]
    lines += [f"| {code} | {kind} | {_MEANINGS[kind]} |" for kind, code in CODES.items()]
    choices = next(
        a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction)
    )
    modules = dict(commands())
    for name, command in choices.items():
        lines += ["", f"## peftfx {name}", ""]
        about = str(command.description)
        lines += [f"{about[0].upper()}{about[1:]}.", "", "```", _usage(name, command), "```", ""]
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [_row(a) for a in _actions(command)]
        if text := details(modules[name]):
            lines += ["", text]
    return "\n".join(lines) + "\n"


def _actions(command: argparse.ArgumentParser) -> list[argparse.Action]:
    """What is named by its place first."""
    shown = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
    return sorted(shown, key=lambda a: (bool(a.option_strings), a.dest == "json"))


def _usage(name: str, command: argparse.ArgumentParser) -> str:
    words: list[str] = []
    for action in _actions(command):
        said = _name(action)
        if action.nargs == "+":
            said += " ..."
        required = action.required and action.nargs != "?"
        words.append(said if required else f"[{said}]")
    return f"peftfx {name} {' '.join(words)}"


def _name(action: argparse.Action) -> str:
    value = str(action.metavar or action.dest).upper().replace("_", "-")
    if not action.option_strings:
        return value
    option = action.option_strings[-1]
    return option if action.nargs == 0 else f"{option} {value}"


def _row(action: argparse.Action) -> str:
    about = action.help or ""
    if action.choices and action.option_strings:
        listed = ", ".join(f"`{c}`" for c in action.choices)
        about = f"{about + ': ' if about else ''}one of {listed}"
    if action.default not in (None, False, "", argparse.SUPPRESS) and action.option_strings:
        about += f" (default: `{action.default}`)"
    return f"| `{_name(action)}` | {about.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
