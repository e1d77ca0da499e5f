"""The programs that commands work on: a model that is named, an adapter, passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .batches import read_batches
from .directories import Directory, to_directory
from .drawing.heat import draw_shares
from .exporters.formats import format_of, load_adapter
from .models import load_model
from .outputs import check_directory, check_folder
from .rewriter.api import Program
from .rewriter.capture.capture import capture
from .rewriter.errors import OptionError
from .rewriter.inputs.dynamic import Dynamic
from .rewriter.pipeline.syntax import as_pipeline
from .rewriter.run.run import run
from .rewriter.storage.stream import RECORD, FoldedCheckpoint
from .shares import HEAD, NUMBERS, share_rows
from .terminal import progress, say, say_table


def program_of(options: Any, passes: str | None = None, hollow: bool = False) -> Program:
    """Captures `options.model`, loads `options.adapter` onto it, if there is one, and runs passes.

    What is typed is looked at first: a wrong word is told before a model is loaded.

    Args:
        options: of a command that takes a model.
        passes: pipeline text or a .yaml recipe.
        hollow: see `load_model`.
    """
    adapter = getattr(options, "adapter", None)
    if adapter:
        format_of(adapter)
    pipeline = as_pipeline(passes) if passes else None
    capturing = capturing_of(options)
    data = getattr(options, "data", None)
    batches = read_batches(data, options.batch) if data else None
    with progress(options, f"loading {options.model}"):
        named = load_model(options.model, hollow)
    with progress(options, "capturing the model as a graph"):
        program = capture(named.model, kwargs=named.example, **capturing)
    if adapter:
        with progress(options, f"loading {adapter}"):
            component = getattr(options, "component", "")
            allow = getattr(options, "allow_base_mismatch", False)
            program = load_adapter(program, adapter, "", component, allow_base_mismatch=allow)
    if pipeline:
        with progress(options, f"running {passes}"):
            program = run(program, pipeline, data=batches)
    return program


def capturing_of(options: Any) -> dict[str, Any]:
    """What `--dynamic` and `--cache` say, as `capture` takes it.

    Raises:
        RewriteError: it is not understood, or no folder.
    """
    if options.cache:
        check_folder(options.cache)
    return {"dynamic": dynamic_of(options.dynamic), "cache": options.cache or False}


def dynamic_of(said: Sequence[str] | None) -> Dynamic:
    """What `--dynamic` says, as `capture` takes it.

    Args:
        said: `INPUT:NAME,NAME,...` with a name for each axis, `-` for one that is fixed; or `none`.

    Raises:
        OptionError: it is none of them.
    """
    if not said:
        return "auto"
    if list(said) == ["none"]:
        return None
    sizes: dict[str, dict[int, str]] = {}
    for text in said:
        name, colon, labels = text.partition(":")
        if not colon or not name or not labels or name in sizes:
            raise OptionError(
                f"--dynamic {text}: it must be an input and the names of its sizes, each input "
                "once. Give --dynamic input_ids:batch,sequence, or --dynamic none."
            )
        named = enumerate(label.strip() for label in labels.split(","))
        sizes[name] = {axis: label for axis, label in named if label != "-"}
    return sizes


def report(options: Any, program: Program) -> list[dict[str, Any]]:
    """Prints the records of all passes; returns them as JSON."""
    for record in program.history:
        say(options, str(record))
    return [
        {
            "pass": r.text, "adapter": r.adapter, "edited": r.edited, "skipped": r.skipped,
            "certificate": {"kind": r.certificate.kind, **r.certificate.measured},
            "seconds": dict(r.seconds),
        }
        for r in program.history
    ]  # fmt: skip


def write_model(options: Any, weights: str | None = None, least: float = 0.0, rank: int = 0) -> Any:
    """A base and an adapter, if there is one, as a Hugging Face directory; returns what was done.

    Args:
        options: with `model`, `adapter` and `out`, the new directory.
        weights, least, rank: see `to_directory`.
    """
    check_directory(options.out, RECORD)
    if options.adapter:
        format_of(options.adapter)
    capturing = capturing_of(options)
    with progress(options, f"writing {options.out} file by file"):
        done = to_directory(
            options.model, options.out, options.adapter, weights=weights,
            capturing=capturing, allow_base_mismatch=options.allow_base_mismatch, least=least,
            rank=rank,
        )  # fmt: skip
    say_directory(options, done)
    return {**asdict(done), "out": options.out}


def say_directory(options: Any, done: Directory | FoldedCheckpoint) -> None:
    """Shows what a fold into a directory did, and what is left of each change."""
    if done.nothing_to_do:
        say(options, f"nothing to do: {options.out} is this adapter in this base already")
    else:
        say(options, f"{len(done.changed)} tensors folded: {options.out}")
    if done.beside:
        count = len(done.beside)
        say(options, f"not all was folded at {count} weights: {options.out}/adapter has the rest")
    if done.resumed:
        say(options, f"{len(done.resumed)} files were written by a run that was stopped")
    for name in done.left_out:
        say(options, f"not copied (other weights): {name}")
    for note in done.notes:
        say(options, note if isinstance(note, str) else ": ".join(note))
    if done.shares:
        say(options, "what rounding to the files' dtype left of what was learnt:")
        say_table(options, HEAD, share_rows(done.shares), NUMBERS)
    if getattr(options, "draw", None):
        draw_shares(options.draw, done.shares)
        say(options, f"drawn to {options.draw}")
