"""What can be typed: the arguments of `peftfx`, a function for each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from .commands import combine, extract, merge
from .exporters.formats import FORMATS

Action = Callable[[Any], Any]
"""Runs a command with its options; what it returns is printed with `--json`."""


def parser(actions: Mapping[str, Action]) -> argparse.ArgumentParser:
    """The parser of all commands, in the order of `actions`, by name."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    whole = argparse.ArgumentParser(
        prog="peftfx", description="Parameter-efficient fine-tuning as graph rewriting."
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, action in actions.items():
        about, arguments = _COMMANDS[name]
        command = commands.add_parser(name, help=about, description=about, parents=[common])
        command.set_defaults(command=action)
        arguments(command)
    return whole


def _model(command: argparse.ArgumentParser) -> None:
    about = "a Hugging Face directory, a GGUF file, or module:function"
    command.add_argument("model", help=about)


def _sites(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("--where", help="a selector, such as '(q|v) and layer>=6'")
    command.add_argument("--draw", metavar="FILE", help="draw them too: a name in .svg or .png")


def _passes(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("passes", nargs="?", help="pipeline text or a .yaml recipe")
    _adapter(command)


def _adapter(command: argparse.ArgumentParser) -> None:
    command.add_argument("--adapter", help="an adapter to load first, of any format that is read")


def _run(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("passes", help="pipeline text or a .yaml recipe")
    _adapter(command)
    command.add_argument("--out", help="directory for the adapter")


def _fold(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("adapter", help="an adapter, of any format that is read")
    command.add_argument("--out", required=True, help="safetensors file for the merged weights")
    streaming = "fold shard by shard; --out is then a new model directory"
    command.add_argument("--stream", action="store_true", help=streaming)
    about = "with --stream: where the weights are, if MODEL is no directory"
    command.add_argument("--weights", metavar="DIR", help=about)
    command.add_argument("--tied", default="refuse", choices=["refuse", "keep", "untie", "both"])


def _convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", help="of any format that is read; for hf, or a GGUF model")
    command.add_argument("out", help="the new directory, or file")
    about = "its model, where sizes or numbers of weights are needed: a directory, whose files are "
    command.add_argument("--base", metavar="MODEL", help=f"{about}read, or module:function")
    about = "build and capture it: for stacks of experts, and where its files use other names"
    command.add_argument("--capture", action="store_true", help=about)
    command.add_argument("--component", default="", help="which adapter of a file with several")
    command.add_argument("--to", required=True, choices=(*FORMATS, "hf"))
    command.add_argument("--rank", type=int, help="of plain-lora (default: the adapter's largest)")


def _export(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("passes", nargs="?", help="pipeline text, such as fold")
    _adapter(command)
    command.add_argument("--out", required=True, help="the ONNX file")
    about = "the adapter's factors are inputs, for .onnx_adapter files"
    command.add_argument("--slots", action="store_true", help=about)
    command.add_argument("--opset", type=int, help="operator set (default: newest that passes)")
    about = "difference allowed, of the largest output (default: 1e-5, more in half precision)"
    command.add_argument("--tolerance", type=float, help=about)
    about = "what half precision in the model becomes (bfloat16 runs in no CPU runtime)"
    command.add_argument("--dtype", choices=["float32", "float16"], help=about)


def _nothing(command: argparse.ArgumentParser) -> None:
    """Takes no arguments of its own."""


def _methods(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help="a model directory, or module:function")


def _memory(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("passes", nargs="?", help="pipeline text or a .yaml recipe")
    command.add_argument("--batch", type=int, help="rows, where the model leaves that open")
    command.add_argument("--seq", type=int, help="tokens, where the model leaves that open")
    command.add_argument("--optimizer", default="adamw", help="adamw, sgd, momentum, ...")


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--source", help="a Python source tree (default: the standard library)")
    command.add_argument("--all", action="store_true", help="compare all methods")
    command.add_argument("--out", default="demo-output", help="directory for report and model")


def _search(command: argparse.ArgumentParser) -> None:
    command.add_argument("query", help="what the function does, in words")
    command.add_argument("--out", default="demo-output", help="the demo's directory")
    command.add_argument("--count", type=int, default=5, help="number of answers")


_COMMANDS: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "sites": ("list the places that passes can rewrite", _sites),
    "print": ("print the graph, after passes if given", _passes),
    "diff": ("show what passes change in the graph", _passes),
    "verify": ("measure every promise of passes or an adapter again", _passes),
    "run": ("apply passes and save the adapter", _run),
    "fold": ("merge a saved adapter into the model's weights", _fold),
    "combine": ("write several adapters as one", combine.arguments),
    "merge": ("merge whole models by a mergekit configuration", merge.arguments),
    "extract": ("write what a fine-tuned model changed as an adapter", extract.arguments),
    "convert": ("write an adapter in another library's format, or a whole model (hf)", _convert),
    "export": ("write a verified ONNX file", _export),
    "passes": ("list the passes", _nothing),
    "methods": ("list the methods, with what they train on a model", _methods),
    "memory": ("what training keeps, without weights or a run", _memory),
    "demo": ("adapt a real embedding model to a code base for search", _demo),
    "search": ("search with the model that the demo exported", _search),
}
"""What each command does, and what adds its arguments."""
