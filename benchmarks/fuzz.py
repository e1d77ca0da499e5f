"""Readers fuzzed by coverage, with atheris; `python -m benchmarks.faults fuzz` runs it."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fuzzing import TARGETS, corpus, mutations


def fuzz(
    seconds: int,
    names: Sequence[str],
    known: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Coverage-guided, every reader in a process of its own; `failed` should be 0.

    Args:
        seconds: for each.
        names: of readers.
        known: what is counted of others.
        keep: takes what is counted so far.
    """
    probe = subprocess.run([sys.executable, "-c", "import atheris"], capture_output=True)
    if probe.returncode:
        return {"skipped": "atheris is not installed: pip install --target DIR atheris"}
    result: dict[str, Any] = {n: r for n, r in known.items() if n in TARGETS}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.faults", "--target", name, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        runs = [line.split() for line in done.stderr.splitlines() if line.startswith("Done ")]
        result[name] = {
            "runs": int(runs[-1][1]) if runs else 0, "seconds": seconds,
            "failed": done.returncode != 0,
        }  # fmt: skip
        if done.returncode:
            print(done.stdout, flush=True)  # the error, which names places on this machine
            result[name]["last"] = done.stderr.splitlines()[-30:]
        keep({"each": result, "failed": sum(r["failed"] for r in result.values())})
    return {"each": result, "failed": sum(r["failed"] for r in result.values())}


_READERS = (
    r"peftfx\.(rewriter\.(storage|capture|files|pipeline\.syntax|program\.selector)"
    r"|exporters|training)"
    r"|yaml\.(scanner|parser|composer|constructor)"
)


def _readers() -> Iterator[Any]:
    """The functions whose branches guide the fuzzer: our own, and those that read YAML."""
    for name, module in list(sys.modules.items()):
        if re.match(_READERS, name):
            for item in vars(module).values():
                if inspect.isfunction(item) and item.__module__ == name:
                    yield item
                elif inspect.isclass(item) and item.__module__ == name:
                    yield from (f for f in vars(item).values() if inspect.isfunction(f))


def fuzz_here(name: str, seconds: int) -> None:
    """Fuzzes one reader in this process."""
    atheris: Any = importlib.import_module("atheris")
    target: Any = TARGETS[name]
    for seed in corpus(name):  # imports and writes what is needed
        target(seed)
    for function in _readers():
        atheris.instrument_func(function)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        """Half of the time by values of JSON, which bytes rarely get right."""
        if seed % 2 and data:
            return next(mutations([data], 1, seed))[:size]
        return atheris.Mutate(data, size)

    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(corpus(name)):
            (Path(folder) / str(index)).write_bytes(data)
        options = [
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=4096",
            "-max_len=8192",
        ]
        os.chdir(folder)
        atheris.Setup([sys.argv[0], folder, *options], target, custom_mutator=mutate)
        atheris.Fuzz()
