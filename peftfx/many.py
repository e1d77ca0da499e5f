"""Many adapters of one base, each folded into a directory of its own: at most one capture, and each
shard of the base is read once for all."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .directories import identity
from .exporters.formats import format_of, load_adapter
from .exporters.hf_names import checkpoint_of
from .exporters.uncaptured import uncaptured
from .models import Named, load_model
from .rewriter.api import Program
from .rewriter.capture.capture import capture
from .rewriter.errors import ArtifactError, OptionError, RewriteError, SystemFailedError
from .rewriter.files.files import write_file, write_json
from .rewriter.files.job import finished
from .rewriter.files.leftovers import make_parents
from .rewriter.storage.artifact import read
from .rewriter.storage.filling import load_weights
from .rewriter.storage.folding import LayoutFolder
from .rewriter.storage.loading import attach
from .rewriter.storage.safetensors_checkpoint import Checkpoint
from .rewriter.storage.stream import (
    RECORD,
    Base,
    FoldedCheckpoint,
    folding,
    said_again,
    writing,
)

REPORT = "fold-all.json"

Steps = Generator[str, None, FoldedCheckpoint]


@dataclass
class Outcome:
    """What became of one adapter.

    Attributes:
        adapter, out: where it is, and its directory.
        status: `done`, `nothing to do` (it was folded before), or `failed`.
        changed: how many tensors folding wrote.
        least_left: the least share of a site's change that rounding left, along its direction.
        lost: the largest rounding error of a site, relative to its change.
        resumed: shards that a killed run had written.
        error, kind: why it failed, and of which kind the error is (`RewriteError.kind`).
        seconds: CPU time of its own.
    """

    adapter: str
    out: str
    status: str = "failed"
    changed: int = 0
    least_left: float = 1.0
    lost: float = 0.0
    resumed: int = 0
    notes: list[str] = field(default_factory=list[str])
    error: str = ""
    kind: str = ""
    seconds: float = 0.0

    def take(self, done: FoldedCheckpoint) -> None:
        """Notes the result."""
        self.status = "nothing to do" if done.nothing_to_do else "done"
        self.changed, self.lost = len(done.changed), done.lost
        self.least_left = min((left for left, _ in done.shares.values()), default=1.0)
        self.resumed = len(done.resumed)
        self.notes = [f"{site}: {note}" for site, note in done.notes]

    def fail(self, error: Exception) -> None:
        """Notes why it failed; errors that are not ours are told with their place."""
        self.status, self.error = "failed", " ".join(str(error).split())
        self.kind = error.kind if isinstance(error, RewriteError) else "internal"
        if isinstance(error, OSError | MemoryError):
            self.kind = "system"
        elif self.kind == "internal":
            self.error = " ".join(" ".join(traceback.format_exception(error)[-2:]).split())


def fold_all(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    jobs: int = 1,
    weights: str | Path | None = None,
    capturing: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Folds each adapter into the base, as `out/<its name>`, and writes `out/fold-all.json`.

    One that fails does not keep the others. Killed at any time, the same call goes on; what is
    done already is left alone.

    Args:
        base: a Hugging Face directory, or `module:function` with `weights`.
        adapters: of any formats that are read; their directories' (or files') names differ.
        jobs: processes, each with a part of the adapters.
        weights: the directory with the safetensors files, if `base` is none.
        capturing: `cache` and `dynamic` of `capture`.
        progress: called with the name of each shard before it is written, with one job.

    Raises:
        OptionError: two adapters have one name, or there are none, or `jobs` is below 1.
        RewriteError: the base cannot be read or captured.
    """
    places = _places(adapters, Path(out), jobs)
    source = Path(weights or base)
    Checkpoint.read(source)  # else each adapter would fail for it
    outcomes = [Outcome(str(a), str(place)) for a, place in places]
    made_of = [_made_of(o, base, weights) for o in outcomes]
    left = [i for i, made in enumerate(made_of) if made is not None]
    if left:
        named = load_model(str(base), hollow=True)
        work = _Work(named, capturing or {}, source, outcomes, made_of, progress)
        work.spread(left, min(jobs, len(left)))
    report = {"base": str(base), "adapters": [asdict(o) for o in outcomes]}
    make_parents(Path(out) / REPORT)  # where all have failed
    write_file(Path(out) / REPORT, write_json(report))
    return outcomes


def _places(adapters: Sequence[str | Path], out: Path, jobs: int) -> list[tuple[str | Path, Path]]:
    if not adapters or jobs < 1:
        what = "there are no adapters to fold" if not adapters else f"jobs={jobs} is below 1"
        raise OptionError(f"{what}. Give one adapter or more, and one job or more.")
    names = [Path(a).resolve() for a in adapters]
    names = [p.stem if p.is_file() else p.name for p in names]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise OptionError(
            f"two adapters are called {twice!r}, so both would be written to {out / twice}. "
            "Rename one directory, or fold them with two commands."
        )
    return [(a, out / n) for a, n in zip(adapters, names, strict=True)]


def _made_of(
    outcome: Outcome, base: str | Path, weights: str | Path | None
) -> dict[str, Any] | None:
    """What a directory is made of; None where there is nothing to do, or it cannot be done."""
    try:
        format_of(outcome.adapter)
        made_of = identity(base, outcome.adapter, weights)
        if (record := finished(outcome.out, RECORD, made_of)) is None:
            return made_of
        outcome.take(said_again(outcome.out, record))
    except ArtifactError as error:
        outcome.fail(error)
    return None


_ON_PARENTS_END = 1
"""Linux' PR_SET_PDEATHSIG."""


def _end_with(parent: int) -> None:
    """Makes the system kill this process with its parent, where it can: a command that was killed
    is typed again, and nothing may still write what that one goes on with."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_ON_PARENTS_END, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Work:
    """The folds of some adapters, shard by shard."""

    def __init__(
        self,
        named: Named,
        capturing: Mapping[str, Any],
        source: Path,
        outcomes: Sequence[Outcome],
        made_of: Sequence[Mapping[str, Any] | None],
        progress: Callable[[str], None] | None,
    ) -> None:
        self.named, self.capturing = named, capturing
        self.outcomes, self.made_of = outcomes, made_of
        self.checkpoint, self.progress = checkpoint_of(source, named.model), progress
        self.layout = named.layout()
        self.digests: dict[str, str] = {}

    @functools.cached_property
    def hollow(self) -> Program:
        """The captured base; not all adapters need it."""
        return capture(self.named.model, kwargs=self.named.example, **self.capturing)

    @functools.cached_property
    def filled(self) -> Program:
        """The same with values, mapped from files."""
        return load_weights(self.hollow, self.checkpoint)

    def _direct(self, index: int) -> tuple[LayoutFolder, Base] | None:
        """How an adapter folds without the captured base; None where it needs that."""
        if self.layout is None:
            return None
        return uncaptured(self.layout, self.checkpoint, self.outcomes[index].adapter)

    def _takes_capture(self, index: int) -> bool:
        try:
            return self._direct(index) is None
        except RewriteError:  # it is told when its turn comes
            return False

    def spread(self, left: Sequence[int], jobs: int) -> None:
        """Gives each process its part; what they say comes back through pipes."""
        if jobs == 1:
            self.run(left)
            return
        if not hasattr(os, "fork"):
            raise OptionError(f"jobs={jobs}: this system has no fork. Leave --jobs out.")
        if any(map(self._takes_capture, left)):  # once, for all processes
            _ = self.filled
        pipes = [self._forked(left[job::jobs]) for job in range(jobs)]
        for job, (child, pipe) in enumerate(pipes):
            with os.fdopen(pipe) as said:
                told = [json.loads(line) for line in said]
            os.waitpid(child, 0)
            for index, values in told:
                vars(self.outcomes[index]).update(values)
            for index in {*left[job::jobs]} - {i for i, _ in told}:
                self.outcomes[index].fail(
                    SystemFailedError("its process was killed. Run it again.")
                )

    def _forked(self, mine: Sequence[int]) -> tuple[int, int]:
        """A child that runs a part: its id, and the pipe that it writes to."""
        reading, writing = os.pipe()
        parent, child = os.getpid(), os.fork()
        if child:
            os.close(writing)
            return child, reading
        try:
            _end_with(parent)
            torch.set_num_threads(1)  # those of the parent are not here
            self.progress = None
            self.run(mine)
            with os.fdopen(writing, "w") as pipe:
                for index in mine:
                    pipe.write(json.dumps([index, asdict(self.outcomes[index])]) + "\n")
        finally:
            os._exit(0)

    def run(self, mine: Sequence[int]) -> None:
        """Writes each shard of all folds before the next."""
        active: dict[int, Steps] = {}
        for index in mine:
            self._timed(index, lambda index=index: active.update({index: self._steps(index)}))
        try:
            while active:
                for index in [*active]:
                    done = self._timed(index, lambda index=index: self._next(active[index]))
                    if done is not False:
                        del active[index]
        finally:
            for steps in active.values():
                steps.close()

    def _timed(self, index: int, action: Callable[[], object]) -> object:
        """Runs a part of one fold; its error is that adapter's alone."""
        outcome, begun = self.outcomes[index], time.process_time()
        try:
            done = action()
            if isinstance(done, FoldedCheckpoint):
                outcome.take(done)
            return done
        except Exception as error:  # noqa: BLE001 - it is told, and the others go on
            outcome.fail(error)
            return None
        finally:
            outcome.seconds += time.process_time() - begun

    def _next(self, steps: Steps) -> FoldedCheckpoint | bool:
        """The result, or False while there is more to write."""
        try:
            file = next(steps)
        except StopIteration as done:
            return done.value
        if self.progress is not None:
            self.progress(file)
        return False

    def _steps(self, index: int) -> Steps:
        adapter, out = self.outcomes[index].adapter, self.outcomes[index].out
        made_of: Any = self.made_of[index]
        direct = self._direct(index)
        if direct is not None:
            folder, base = direct
            return writing(folder, out, made_of, replace(base, digests=self.digests))
        expected = None
        if format_of(adapter) == "peftfx":
            artifact = read(adapter)
            expected, program = artifact.base, attach(self.hollow, artifact, adapter)
        else:
            program = load_adapter(self.filled, adapter)
        return folding(program, self.checkpoint, out, expected, adapter, made_of, self.digests)
