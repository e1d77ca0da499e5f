"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_model(command: argparse.ArgumentParser) -> None:
    """MODEL."""
    about = "a Hugging Face directory, a GGUF file, or module:function"
    command.add_argument("model", help=about)


def add_adapter(command: argparse.ArgumentParser) -> None:
    """--adapter."""
    command.add_argument("--adapter", help="an adapter to load first, of any format that is read")


def add_passes(command: argparse.ArgumentParser) -> None:
    """MODEL [PASSES] [--adapter ADAPTER]."""
    add_model(command)
    command.add_argument("passes", nargs="?", help="pipeline text or a .yaml recipe")
    add_adapter(command)
