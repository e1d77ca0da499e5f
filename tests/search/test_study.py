"""The search: resumed, in several workers, killed, locked out, and given nonsense."""

from __future__ import annotations

import importlib.util
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import peftfx
from peftfx.rewriter.errors import OptionError, PassError, SystemFailedError
from peftfx.search import Space, search
from peftfx.search.sampling import library

from .common import command, distinct, environment, recipes, score, small, space

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="optuna is not installed"
)


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    return small()


@pytest.fixture(autouse=True)
def quiet() -> None:
    library().logging.set_verbosity(library().logging.ERROR)


def test_spaces_are_the_papers(base: peftfx.Program) -> None:
    found = Space.of(base)
    assert found.layers == (0, 1, 2)
    assert found.sizes == dict.fromkeys(("serial", "parallel", "prefix"), (0, 1, 2, 4, 8))
    assert found.count == 2**3 * 5**3
    text = found.recipe([0, 2], {"serial": 4, "parallel": 0, "prefix": 2})
    assert text == "autopeft{layers=[0,2],serial=4,parallel=0,prefix=2}"
    assert space(rest="bitfit").recipe([], {"serial": 4}) == "bitfit"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_a_search_evaluates_each_configuration_once(base: peftfx.Program, sampler: str) -> None:
    asked: list[str] = []

    def evaluate(program: peftfx.Program) -> float:
        asked.append(program.history[-1].text)
        return score(program)

    found = search(base, space(), evaluate, trials=10, startup=4, sampler=sampler)
    assert found.stopped == "trials" and len(found.trials) == len(asked) == 10
    assert distinct(asked) and [peftfx.parse(r) for r in recipes(found)] == [
        peftfx.parse(r) for r in asked
    ]
    for trial in found.front:
        program = peftfx.run(base, trial.recipe)
        assert trial.parameters == sum(p.numel() for p in program.trainable_parameters())
        assert trial.scores == (score(program),)


def test_resumed_is_as_if_never_stopped(base: peftfx.Program, tmp_path: Path) -> None:
    """With one seed, whether samplers are made once or again."""
    options: Any = {"sampler": "tpe", "startup": 5, "seed": 3}
    whole = search(base, space(), score, trials=9, **options)
    for count in (4, 7, 9):
        parts = search(base, space(), score, trials=count, storage=tmp_path / "a.db", **options)
    assert recipes(parts) == recipes(whole) and distinct(recipes(whole))
    options["seed"] = 4
    other = search(base, space(), score, trials=9, **options)
    assert recipes(other) != recipes(whole)
    again = search(base, space(), score, trials=9, storage=tmp_path / "a.db")
    assert again == parts


def test_threads_and_processes_share_a_storage(base: peftfx.Program, tmp_path: Path) -> None:
    storage = str(tmp_path / "shared.db")
    search(base, space(), score, trials=2, sampler="random", storage=storage)
    other = subprocess.Popen(command(storage, 14, 0.05), env=environment())
    found = search(base, space(), score, trials=14, sampler="random", storage=storage, jobs=2)
    assert other.wait(120) == 0
    final = search(base, space(), score, trials=14, sampler="random", storage=storage)
    assert final.stopped == "trials" and 14 <= len(final.trials) <= 14 + 2
    assert {*recipes(found)} <= {*recipes(final)} and distinct(recipes(final))


def test_a_killed_worker_loses_one_trial_which_is_taken_over(
    base: peftfx.Program, tmp_path: Path
) -> None:
    storage, mark = str(tmp_path / "killed.db"), tmp_path / "mark"
    search(base, space(), score, trials=3, sampler="random", storage=storage)
    other = subprocess.Popen(command(storage, 9, 60.0, str(mark)), env=environment())
    deadline = time.monotonic() + 120
    while not mark.exists() or not mark.read_text():
        assert time.monotonic() < deadline and other.poll() is None
        time.sleep(0.05)
    other.kill()
    other.wait(30)
    time.sleep(3)  # two heartbeats of a second
    lost = peftfx.parse(mark.read_text())
    options: Any = {"sampler": "random", "storage": storage, "heartbeat": 1}
    found = search(base, space(), score, trials=6, **options)
    assert len(found.trials) == 6 and distinct(recipes(found))
    assert lost in [peftfx.parse(r) for r in recipes(found)]


@pytest.mark.filterwarnings(  # the library's own thread of heartbeats meets the lock, too
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
def test_a_locked_storage_is_told_and_nothing_is_lost(base: peftfx.Program, tmp_path: Path) -> None:
    path = tmp_path / "locked.db"
    url = f"sqlite:///{path}?timeout=0.2"
    before = search(base, space(), score, trials=3, sampler="random", storage=url)
    with sqlite3.connect(path) as held:
        held.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SystemFailedError, match=r"locked.*Finished trials are kept.*Give"):
            search(base, space(), score, trials=5, sampler="random", storage=url)
        held.rollback()
    held.close()
    after = search(base, space(), score, trials=5, sampler="random", storage=url)
    assert after.trials[:3] == before.trials
    with pytest.raises(SystemFailedError, match="Give another"):
        search(base, space(), score, storage=tmp_path / "no folder" / "a.db")


def test_what_evaluate_raises_ends_the_search_and_keeps_the_rest(
    base: peftfx.Program, tmp_path: Path
) -> None:
    calls: list[int] = []

    def fails(program: peftfx.Program) -> float:
        calls.append(0)
        if len(calls) == 4:
            raise ZeroDivisionError("of the task")
        return float("nan") if len(calls) == 6 else score(program)

    options: Any = {"trials": 8, "sampler": "random", "storage": tmp_path / "a.db"}
    with pytest.raises(ZeroDivisionError):
        search(base, space(), fails, **options)
    with pytest.raises(PassError, match=r"gave nan for autopeft.*Trials before it are kept"):
        search(base, space(), fails, **options)
    found = search(base, space(), fails, **options)
    assert len(found.trials) == 8 and distinct(recipes(found)) and len(calls) == 10


def test_several_scores(base: peftfx.Program) -> None:
    def two(program: peftfx.Program) -> tuple[float, float]:
        return score(program), -score(program)

    found = search(base, space(), two, trials=6, sampler="random", scores=("gain", "calm"))
    assert len(found.front) == 6  # what one score gains the other loses
    with pytest.raises(PassError, match="gain, calm"):
        search(base, space(), score, trials=2, scores=("gain", "calm"))


def test_early_stopping(base: peftfx.Program) -> None:
    found = search(base, space(), lambda _: 1.0, trials=60, patience=6, sampler="random")
    assert found.stopped == "patience" and len(found.trials) < 60
    few = Space((0,), {"serial": (0, 2, 4)})
    found = search(base, few, score, trials=60)
    assert found.stopped == "exhausted" and len(found.trials) == 2
    found = search(base, space(), score, trials=60, timeout=0.01)
    assert found.stopped == "timeout" and 1 <= len(found.trials) < 60


def test_other_searches_do_not_mix(base: peftfx.Program, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    search(base, space(), score, trials=1, storage=path)
    with pytest.raises(OptionError, match=r"has other sizes.*Choose another name"):
        search(base, Space((0, 1, 2), {"serial": (0, 2)}), score, trials=2, storage=path)
    other = peftfx.run(base, "lora{where=linear}")
    found = search(other, space(), score, trials=1, storage=path, name="other")
    assert len(found.trials) == 1


def test_spaces_that_are_empty_or_refused(base: peftfx.Program) -> None:
    for layers, sizes in (((), {"serial": (0, 2)}), ((0,), {"serial": (0,)}), ((0,), {})):
        with pytest.raises(OptionError, match=r"search space is empty.*Give"):
            Space(layers, sizes)
    with pytest.raises(OptionError, match=r"no option 'krona'"):
        Space((0,), {"krona": (0, 2)})
    with pytest.raises(OptionError, match="rising"):
        Space((0,), {"serial": (4, 2)})
    asked: list[Any] = []
    attention = Space((0, 1, 2), {"serial": (0, 2), "prefix": (0, 2)})
    with pytest.raises(OptionError, match=r"refuses: autopeft.*prefix=2.*Leave prefix out"):
        search(base, attention, asked.append, trials=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match=r"no layer 7.*Leave serial out"):
        search(base, Space((0, 7), {"serial": (0, 2)}), score)
    taken = peftfx.run(base, "autopeft{serial=2}")
    with pytest.raises(OptionError, match="there is an adapter 'autopeft' already"):
        search(taken, space(), score)
    with pytest.raises(OptionError, match=r"no sampler 'best'.*Choose one of tpe"):
        search(base, space(), score, sampler="best")
    with pytest.raises(OptionError, match="trials=0"):
        search(base, space(), score, trials=0)
    assert not asked
