"""The command line: parses, runs a file of `commands/`, and reports its errors.

An error is one readable line on stderr, or with `--json` one document on stdout; the exit code
says of which kind it is (`CODES`).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from rich.markup import escape

from .commands import commands
from .rewriter.errors import OptionError, RewriteError, nearest
from .rewriter.storage.artifact import VERSION
from .terminal import ERR

CODES: Mapping[str, int] = {
    "contract": 1, "usage": 2, "base": 3, "damage": 4, "system": 5, "internal": 70,
    "interrupted": 130,
}  # fmt: skip
"""Kind of an error (`RewriteError.kind`) -> exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    typed = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parsed(typed)
        result = options.command(options)
        if options.json:
            print(json.dumps(result, indent=1, default=str))
        sys.stdout.flush()
    except RewriteError as error:
        return _fail(typed, str(error), error.kind, error.report)
    except KeyboardInterrupt:
        return _fail(typed, "interrupted", "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to say at exit
        return 0
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(typed, f"there is not enough memory. {error}", "system")
    except Exception as error:  # noqa: BLE001 - exit code 1 would be that of a broken promise
        return _unexpected(typed, error)
    return 0


def _unexpected(typed: Sequence[str], error: Exception) -> int:
    """The system's refusals, as far as no other error says them; all else is a fault of ours."""
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):  # torch's allocator
        return _fail(typed, f"there is not enough memory: {error}", "system")
    if isinstance(error, OSError) and error.errno is not None:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
        return _fail(typed, str(error), "usage" if missing else "system")
    traceback.print_exception(error)
    return _fail(typed, f"{type(error).__name__}: {error}. Report this, please.", "internal")


def _fail(
    typed: Sequence[str], message: str, kind: str, report: Mapping[str, Any] | None = None
) -> int:
    line = " ".join(message.split())
    if "--json" in typed:
        said = {"error": line, "kind": kind, "code": CODES[kind]}
        print(json.dumps(said if report is None else {**report, **said}, default=str))
    else:
        ERR.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    return CODES[kind]


class Parser(argparse.ArgumentParser):
    """Raises OptionError for what is typed wrong, with what is nearest to it."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. See {self.prog} --help.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Of choices, the commands among them."""
        if action.choices is not None and value not in action.choices:
            what = action.option_strings[-1] if action.option_strings else "command"
            raise argparse.ArgumentError(
                None,
                f"there is no {what} {value}. Nearest: {nearest(str(value), action.choices)}. "
                f"Choose one of {', '.join(map(str, action.choices))}",
            )


def parsed(typed: Sequence[str]) -> Any:
    """The options of a command; `command` is the function to run.

    Raises:
        OptionError: they are not understood.
    """
    options, unknown = parser().parse_known_args(typed)
    if unknown:
        known = [name for action in options.parser._actions for name in action.option_strings]
        said = next((u for u in unknown if u.startswith("-")), unknown[0])
        name = said.partition("=")[0]
        near = f" Nearest: {nearest(name, known)}." if name.startswith("-") else ""
        raise OptionError(
            f"{options.parser.prog} does not take {name!r}.{near} See {options.parser.prog} --help."
        )
    _require_words(options)
    return options


def _require_words(options: Any) -> None:
    """Raises OptionError for an empty word: it would count as one that was left out."""
    for action in options.parser._actions:
        value = getattr(options, action.dest, None)
        if value != action.default and "" in (value if isinstance(value, list) else [value]):
            name = action.option_strings[-1] if action.option_strings else action.dest.upper()
            raise OptionError(
                f"{name} is empty, as where a variable of the shell is not set. Give it a value, "
                "or leave it out."
            )


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    whole = Parser(
        prog="peftfx", description="Parameter-efficient fine-tuning as graph rewriting.",
        allow_abbrev=False,
    )  # fmt: skip
    whole.add_argument("--version", action="version", version=f"peftfx {VERSION}")
    listed = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, module in commands():
        about = _about(module)
        one = listed.add_parser(
            name, help=about, description=about, epilog=details(module), parents=[common],
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        one.set_defaults(command=module.command, parser=one)
        module.arguments(one)
    return whole


def details(module: Any) -> str:
    """All paragraphs of a docstring but the first."""
    return module.__doc__.partition("\n\n")[2].strip()


def _about(module: Any) -> str:
    """The first line of a docstring as the middle of a sentence."""
    line = module.__doc__.partition("\n")[0].rstrip(".")
    return line[0].lower() + line[1:]


if __name__ == "__main__":
    sys.exit(main())
