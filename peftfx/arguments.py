"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_model(command: argparse.ArgumentParser, optional: bool = False) -> None:
    """MODEL, and how it is captured."""
    about = "a Hugging Face directory, a GGUF file, or module:function"
    command.add_argument("model", nargs="?" if optional else None, help=about)
    add_capturing(command)


def add_capturing(command: argparse.ArgumentParser) -> None:
    """--cache and --dynamic."""
    about = "keep captures there: the second time, the same model is not traced again"
    command.add_argument("--cache", metavar="DIR", help=about)
    about = (
        "sizes left open, by axis, '-' for one that is fixed: input_ids:batch,sequence (again for "
        "each input; others are fixed); or 'none': all are fixed (default: what the model allows)"
    )
    command.add_argument("--dynamic", action="append", metavar="INPUT:NAMES", help=about)


def add_adapter(command: argparse.ArgumentParser) -> None:
    """--adapter."""
    command.add_argument("--adapter", help="an adapter to load first, of any format that is read")
    add_mismatch(command)


def add_mismatch(command: argparse.ArgumentParser) -> None:
    """--allow-base-mismatch."""
    about = "load what peftfx saved onto other weights than it was trained on; the record says so"
    command.add_argument("--allow-base-mismatch", action="store_true", help=about)


def add_passes(command: argparse.ArgumentParser) -> None:
    """MODEL [PASSES] [--adapter ADAPTER]."""
    add_model(command)
    command.add_argument("passes", nargs="?", help="pipeline text or a .yaml recipe")
    add_adapter(command)
