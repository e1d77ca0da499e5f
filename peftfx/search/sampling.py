"""Samplers of optuna, whose draws depend on the seed and the number of the trial alone.

A sampler of a given seed that is made again, by a resumed study or by a second worker, begins its
random numbers again and repeats its trials. Here every trial has a sampler of its own, seeded by
its number, which the storage gives to one worker only.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any

from ..rewriter.errors import OptionError, SystemFailedError


def library() -> Any:
    """The module optuna.

    Raises:
        SystemFailedError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise SystemFailedError(
            f"searching needs optuna, which cannot be imported ({error}). Give this environment "
            "the extra: pip install 'peftfx[search]'."
        ) from error


def maker(name: str, startup: int) -> Callable[[int], Any]:
    """What makes a sampler of a seed.

    Args:
        name: `tpe`, `gp` (Gaussian processes, expected hypervolume improvement), `botorch` (qNEHVI;
            needs optuna-integration and botorch), `nsga2` or `random`.
        startup: trials that are drawn at random first.
    """
    samplers = library().samplers
    known: dict[str, Callable[[int], Any]] = {
        "tpe": lambda s: samplers.TPESampler(seed=s, n_startup_trials=startup),
        "gp": lambda s: samplers.GPSampler(seed=s, n_startup_trials=startup),
        "botorch": lambda s: _botorch(s, startup),
        "nsga2": lambda s: samplers.NSGAIISampler(seed=s, population_size=max(2, startup)),
        "random": lambda s: samplers.RandomSampler(seed=s),
    }
    if name not in known:
        raise OptionError(f"there is no sampler {name!r}. Choose one of {', '.join(known)}.")
    return known[name]


def _botorch(seed: int, startup: int) -> Any:
    try:
        integration: Any = importlib.import_module("optuna_integration")
        return integration.BoTorchSampler(seed=seed, n_startup_trials=startup)
    except ImportError as error:
        raise SystemFailedError(
            f"the sampler botorch cannot be imported ({error}). Give this environment it: pip "
            "install optuna-integration botorch; or choose sampler='gp'."
        ) from error


def seeded(make: Callable[[int], Any], seed: int) -> Any:
    """A sampler that is another one for each trial."""
    base: Any = library().samplers.BaseSampler

    class Numbered(base):
        """Hands each trial to a sampler made for its number.

        Attributes:
            at_random: the next trial is drawn at random.
        """

        def __init__(self) -> None:
            self.own: dict[int, Any] = {}
            self.at_random = False

        def sampler(self, trial: Any) -> Any:
            return self.own[trial.number]

        def before_trial(self, study: Any, trial: Any) -> None:
            digest = hashlib.sha256(f"{seed} {trial.number}".encode()).digest()
            drawing = library().samplers.RandomSampler if self.at_random else make
            self.at_random = False
            made = drawing(int.from_bytes(digest[:4], "little"))
            self.own[trial.number] = made
            made.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.sampler(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.sampler(trial).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self.sampler(trial).sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.own.pop(trial.number).after_trial(study, trial, state, values)

    return Numbered()
