"""The search itself: a study of optuna's, in a storage that workers share and resume."""

from __future__ import annotations

import contextlib
import importlib
import math
import random
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from ..rewriter.api import Program
from ..rewriter.errors import OptionError, PassError, SystemFailedError
from ..rewriter.files.identity import merkle_root
from ..rewriter.program.unchanged import base_digests
from ..rewriter.run.run import run
from .front import Found, Trial, Values, front_of, volume
from .sampling import library, maker, seeded
from .space import Space

Evaluate = Callable[[Program], float | Sequence[float]]
_REPEAT = "not evaluated"
"""Attribute of a trial whose configuration an earlier one has, or that tunes nothing."""

_UNSAID = 5.0
"""Seconds that a trial waits for earlier ones that have said nothing: their worker may be gone."""
_DRAWS = 200
"""Configurations that are drawn to find one that no trial had."""

LEAST_GAIN = 1e-3
"""The share of the hypervolume that a trial must add for patience to begin again."""


def search(
    program: Program,
    space: Space,
    evaluate: Evaluate,
    *,
    trials: int = 100,
    sampler: str = "tpe",
    startup: int = 10,
    seed: int = 0,
    storage: str | Path | None = None,
    name: str = "peftfx",
    jobs: int = 1,
    patience: int | None = None,
    timeout: float | None = None,
    scores: Sequence[str] = ("score",),
    heartbeat: int = 60,
) -> Found:
    """Looks for configurations with high scores and few parameters.

    A configuration that was evaluated before, also by another worker, is not evaluated again, and
    counts for nothing. Whatever ends a search, finished trials stay in the storage.

    Args:
        program: what configurations are inserted into; never changed.
        space: of the configurations.
        evaluate: trains and scores a program; one number, or as many as `scores`. It is called in
            threads with several jobs.
        trials: how many to evaluate, by all workers and resumed runs of the study together; with
            several workers at most one more for each other one.
        sampler, startup: see `maker`.
        seed: together with a trial's number what it draws.
        storage: a path (SQLite), or a URL of SQLAlchemy's, such as
            `postgresql://user@host/database`, for several machines; by default memory.
        name: of the study in the storage.
        jobs: threads here, optuna's `n_jobs`. Other processes and machines make the same call.
        patience: stop behind so many trials of which none adds a thousandth to the hypervolume.
        timeout: stop after so many seconds.
        scores: names of what `evaluate` gives.
        heartbeat: seconds between signs of life in a storage; a trial of a worker that gives none
            for two of them is taken over.

    Raises:
        OptionError: the space holds what the program refuses, or the study is of another one.
        PassError: `evaluate` gave no finite number, or too few.
        SystemFailedError: the storage cannot be opened, read or written; optuna is missing.
    """
    for option, value in {
        "trials": trials,
        "jobs": jobs,
        "startup": startup,
        "scores": len(scores),
    }.items():
        if value < 1:
            raise OptionError(f"search: {option}={value}, but at least 1 is needed. Choose more.")
    space.admit(program)
    make = maker(sampler, startup)
    where = "memory" if storage is None else str(storage)
    with _storage_errors(where):
        study = _opened(where, name, heartbeat, len(scores), seeded(make, seed))
        _require_same(study, where, name, space, program, scores)
        worker = _Worker(program, space, evaluate, study, trials, patience, tuple(scores), seed)
        worker.check()
        if not worker.stopped:
            callbacks = [worker.finished]
            study.optimize(worker.objective, n_jobs=jobs, timeout=timeout, callbacks=callbacks)
        return Found(tuple(worker.done()), worker.stopped or "timeout", tuple(scores))


@dataclass
class _Worker:
    program: Program
    space: Space
    evaluate: Evaluate
    study: Any
    trials: int
    patience: int | None
    scores: tuple[str, ...]
    seed: int
    stopped: str = ""
    states: Any = field(default_factory=lambda: library().trial.TrialState)

    def objective(self, trial: Any) -> Values:
        """Scores of a trial's configuration, and its number of parameters."""
        recipe = self.space.chosen(trial)
        trial.set_user_attr("recipe", recipe)
        if recipe == self.space.rest:
            trial.set_user_attr(_REPEAT, "tunes nothing")
            return self._worst()
        earlier = self._others(trial, recipe)
        if not earlier:
            return self._evaluated(recipe)
        trial.set_user_attr(_REPEAT, f"trial {earlier[0].number}")
        self._turn_away(trial)
        if earlier[0].state == self.states.RUNNING:
            raise library().TrialPruned("another worker has it")
        return tuple(earlier[0].values)

    def _worst(self) -> Values:
        """Values that every sampler turns away from: those of no adapter would draw all to it."""
        done = self.done()
        scores = (
            zip(*(t.scores for t in done), strict=True) if done else ((0.0,),) * len(self.scores)
        )
        return (*map(min, scores), float(max((t.parameters for t in done), default=0) + 1))

    def _turn_away(self, trial: Any) -> None:
        """Has the next trial drawn at random where the sampler repeats itself, and ends the search
        where that finds nothing either."""
        source = random.Random(f"{self.seed} {trial.number}")
        had = {t.user_attrs.get("recipe") for t in self.study.get_trials(deepcopy=False)}
        drawn = (self.space.text(self.space.drawn(source)) for _ in range(_DRAWS))
        if all(text in had or text == self.space.rest for text in drawn):
            self.stopped = "exhausted"
        self.study.sampler.at_random = True

    def _others(self, trial: Any, recipe: str) -> list[Any]:
        """Earlier trials of a configuration, those that are done first. What other workers began
        earlier has to say first which configuration it has."""
        wanted = (self.states.COMPLETE, self.states.RUNNING)
        until = time.monotonic() + _UNSAID
        while True:
            found = self.study.get_trials(deepcopy=False, states=wanted)
            before = [t for t in found if t.number < trial.number]
            if all("recipe" in t.user_attrs for t in before) or time.monotonic() > until:
                break
            time.sleep(0.02)
        same = [t for t in before if t.user_attrs.get("recipe") == recipe]
        return sorted(same, key=lambda t: (t.state != self.states.COMPLETE, t.number))

    def _evaluated(self, recipe: str) -> Values:
        candidate = run(self.program, recipe)
        count = sum(p.numel() for p in candidate.trainable_parameters())
        got: Any = self.evaluate(candidate)
        each = got if isinstance(got, Sequence) else (got,)
        values = tuple(float(v) if isinstance(v, SupportsFloat) else math.nan for v in each)
        if len(values) != len(self.scores) or not all(map(math.isfinite, values)):
            raise PassError(
                f"evaluate gave {got!r} for {recipe}, but it must give a finite number for each of "
                f"{', '.join(self.scores)}. Trials before it are kept. Give a number for every "
                "configuration, 0.0 where training fails."
            )
        return (*values, float(count))

    def finished(self, study: Any, trial: Any) -> None:
        """Optuna's callback behind a trial."""
        del trial
        self.check()
        if self.stopped:
            study.stop()

    def check(self) -> None:
        """Says why the search is at its end, if it is."""
        done = self.done()
        if len(done) >= self.trials:
            self.stopped = "trials"
        elif self.patience is not None and _idle(done) >= self.patience:
            self.stopped = "patience"

    def done(self) -> list[Trial]:
        """All evaluated trials of the study."""
        found = self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,))
        return [
            Trial(t.number, t.user_attrs["recipe"], tuple(t.values[:-1]), int(t.values[-1]))
            for t in found
            if _REPEAT not in t.user_attrs
        ]


def _idle(done: Sequence[Trial]) -> int:
    """How many trials there were since the hypervolume last grew by `LEAST_GAIN` of itself; what
    counts as nothing are the worst values of all."""
    if not done:
        return 0
    reference = tuple(min(column) for column in zip(*(t.values for t in done), strict=True))
    points: list[Values] = []
    reached, last = 0.0, 0
    for index in range(len(done)):
        points = [t.values for t in front_of(done[: index + 1])]
        size = volume(points, reference)
        if size > reached * (1 + LEAST_GAIN):
            reached, last = size, index
    return len(done) - 1 - last


def _opened(where: str, name: str, heartbeat: int, scores: int, sampler: Any) -> Any:
    """The study, new or as it was left."""
    optuna = library()
    storage = None
    if where != "memory":
        url = where if "://" in where else f"sqlite:///{Path(where).resolve()}"
        patient = url.startswith("sqlite") and "timeout=" not in url
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if patient else None,
                heartbeat_interval=heartbeat,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
    directions = ["maximize"] * scores + ["minimize"]
    return optuna.create_study(
        storage=storage,
        sampler=sampler,
        study_name=name,
        load_if_exists=True,
        directions=directions,
    )


def _require_same(
    study: Any, where: str, name: str, space: Space, program: Program, scores: Sequence[str]
) -> None:
    """Raises OptionError if the study's trials are of another space or model."""
    root = merkle_root(base_digests(program))
    own = {**space.stated(), "base": root, "scores": list(scores)}
    held = study.user_attrs.get("space")
    if held is None:
        study.set_user_attr("space", own)
    elif held != own:
        other = next((k for k in own if held.get(k) != own[k]), "space")
        raise OptionError(
            f"the study {name!r} in {where} has other {other}, so its trials say nothing about "
            "this search. Choose another name=, or another storage=."
        )


@contextlib.contextmanager
def _storage_errors(where: str) -> Generator[None]:
    """What a storage fails with, as an error that says what to do."""
    failures = (library().exceptions.StorageInternalError, _sqlalchemy_error())
    try:
        yield
    except failures as error:
        cause = error.__cause__ or error
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise SystemFailedError(
            f"the storage {where} failed ({first}). Finished trials are kept in it. Give another "
            "storage=, or make the same call again once nothing else holds it."
        ) from error


def _sqlalchemy_error() -> type[Exception]:
    exceptions: Any = importlib.import_module("sqlalchemy.exc")
    return exceptions.SQLAlchemyError
