"""The command line: parses, runs a file of `commands/`, and reports its errors.

A user error is one readable line on stderr and exit code 2. `--json` prints one JSON document
instead of tables, for machines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from .commands import commands
from .rewriter.errors import RewriteError
from .terminal import ERR


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        result = options.command(options)
    except RewriteError as error:
        return _fail(options, str(error))
    except KeyboardInterrupt:
        return _fail(options, "interrupted", 130)
    except BrokenPipeError:
        return 0
    if options.json:
        print(json.dumps(result, indent=1, default=str))
    return 0


def _fail(options: Any, message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    if options.json:
        print(json.dumps({"error": line}))
    else:
        ERR.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it parses is the function to run."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    whole = argparse.ArgumentParser(
        prog="peftfx", description="Parameter-efficient fine-tuning as graph rewriting."
    )
    listed = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, module in commands():
        about = _about(module)
        one = listed.add_parser(name, help=about, description=about, parents=[common])
        one.set_defaults(command=module.command)
        module.arguments(one)
    return whole


def _about(module: Any) -> str:
    """The first line of a docstring as the middle of a sentence."""
    line = module.__doc__.partition("\n")[0].rstrip(".")
    return line[0].lower() + line[1:]


if __name__ == "__main__":
    sys.exit(main())
