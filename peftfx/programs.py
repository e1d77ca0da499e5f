"""The programs that commands work on: a model that is named, an adapter, passes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .directories import to_directory
from .exporters.formats import load_adapter
from .models import load_model
from .rewriter.api import Program
from .rewriter.capture.capture import capture
from .rewriter.run.run import run
from .terminal import progress, say


def program_of(options: Any, passes: str | None = None, hollow: bool = False) -> Program:
    """Captures `options.model`, loads `options.adapter` onto it, if there is one, and runs passes.

    Args:
        options: of a command that takes a model.
        passes: pipeline text or a .yaml recipe.
        hollow: see `load_model`.
    """
    with progress(options, f"loading {options.model}"):
        named = load_model(options.model, hollow)
    with progress(options, "capturing the model as a graph"):
        program = capture(named.model, kwargs=named.example)
    adapter = getattr(options, "adapter", None)
    if adapter:
        with progress(options, f"loading {adapter}"):
            component = getattr(options, "component", "")
            program = load_adapter(program, adapter, component=component)
    if passes:
        with progress(options, f"running {passes}"):
            program = run(program, passes)
    return program


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


def write_model(options: Any, weights: str | None = None) -> Any:
    """A base and an adapter, if there is one, as a Hugging Face directory; returns what was done.

    Args:
        options: with `model`, `adapter` and `out`, the new directory.
        weights: see `to_directory`.
    """
    with progress(options, f"writing {options.out} file by file"):
        done = to_directory(options.model, options.out, options.adapter, weights=weights)
    say(options, f"{len(done.changed)} tensors folded: {options.out}")
    for name in done.left_out:
        say(options, f"not copied (other weights): {name}")
    for note in done.notes:
        say(options, note)
    return {**asdict(done), "out": options.out}
