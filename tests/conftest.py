"""Programs that are made once a session: captured models, and methods placed in them. Tests get
copies of what they may change; whatever else they change is an error at the next use."""

from __future__ import annotations

import functools
import gc
import getpass
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx import programs
from peftfx.rewriter.capture.capture import capture

from . import models, recipes
from .captures import ROOT, captures
from .cpu import BUDGET, Seconds, methods_of, shared
from .temporary import remove
from .zoo import ZOO

CAPTURING = (
    "test_cache", "test_capture", "test_mutations", "test_probe_sizes", "test_sizes",
    "test_threads", "test_zoo_capture",
)  # fmt: skip
"""Files about capturing itself, or that seed faults: nothing of their own is stored or recalled."""

KEPT_BY_OTHERS = (".ses", "torchinductor_")
"""What ONNX Runtime and torch's compiler leave in the system's temporary folder, for the next time."""

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.expect")


def tensors_of(program: peftfx.Program) -> dict[str, Tensor]:
    """The values of all tensors, which tests share."""
    module = program.module
    return {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}


class Rewritten:
    """What recipes made of programs, each run once a session; tests get copies."""

    def __init__(self) -> None:
        self.programs: dict[tuple[str, str], tuple[peftfx.Program, dict[str, Tensor]]] = {}

    def get(self, name: str, recipe: str, rewrite: Callable[[], peftfx.Program]) -> peftfx.Program:
        """A copy of what `rewrite` made the first time, by the base's name and the recipe."""
        if (name, recipe) not in self.programs:
            program = rewrite()
            self.programs[name, recipe] = (
                program,
                {n: t.clone() for n, t in tensors_of(program).items()},
            )
        program, before = self.programs[name, recipe]
        after = tensors_of(program)
        changed = [n for n, t in before.items() if not torch.equal(t, after[n])]
        assert not changed, f"a test changed tensors that others use, too: {changed}"
        return program.fork()


class Captured:
    """Models and their programs by name, captured on first use."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[Any, peftfx.Program]] = {}
        self.started: dict[tuple[str, str], tuple[peftfx.Program, str]] = {}
        self.rewritten = Rewritten()

    def adapted(self, name: str, recipe: str) -> peftfx.Program:
        """A copy of a base after a recipe, which is run once a session."""
        return self.rewritten.get(name, recipe, lambda: peftfx.run(self[name][1], recipe))

    def start(self, name: str, method: str) -> tuple[peftfx.Program, str]:
        """The program that a method's pass is run on, and that pass as text."""
        if (name, method) not in self.started:
            self.started[name, method] = recipes.start(self[name][1], method)
        return self.started[name, method]

    def placed(self, name: str, method: str) -> peftfx.Program:
        """A copy of a base with a method's small recipe, which is run once a session."""
        return self.rewritten.get(
            name, f"its small recipe: {method}", lambda: peftfx.run(*self.start(name, method))
        )

    def double(self, name: str) -> peftfx.Program:
        """The program in float64, for what has to be exact."""
        key = f"{name} in float64"
        if key not in self.made:
            self.made[key] = self._capture(name, torch.float64)
        return self.made[key][1]

    def __getitem__(self, name: str) -> tuple[Any, peftfx.Program]:
        if name not in self.made:
            self.made[name] = self._capture(name)
        return self.made[name]

    def _capture(self, name: str, dtype: torch.dtype | None = None) -> tuple[Any, peftfx.Program]:
        with shared():
            model, inputs = models.build(name), models.batch()
            if name == "fused":
                del inputs["attention_mask"]
            return model, peftfx.capture(model, kwargs=inputs, dtype=dtype, cache=captures())


class Zoo:
    """Programs of the zoo's architectures by name, captured on first use, and their models."""

    def __init__(self) -> None:
        self.made: dict[str, peftfx.Program] = {}
        self.models: dict[str, Any] = {}
        self.rewritten = Rewritten()

    def adapted(self, name: str, recipe: str) -> peftfx.Program:
        """A copy of a program after a recipe, which is run once a session."""
        return self.rewritten.get(name, recipe, lambda: peftfx.run(self[name], recipe))

    def model(self, name: str) -> Any:
        """The model that the program was captured from."""
        if name not in self.models:
            with shared():
                self.models[name] = ZOO[name].build()
        return self.models[name]

    def __getitem__(self, name: str) -> peftfx.Program:
        if name not in self.made:
            with shared():
                inputs = ZOO[name].inputs(3, 9)
                self.made[name] = peftfx.capture(self.model(name), kwargs=inputs, cache=captures())
        return self.made[name]


@pytest.fixture(autouse=True, scope="session")
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The system's temporary folder is one of the session's own, and empty again at its end: what
    tests, the code under test, and the processes of both put there, they remove."""
    folder, usual = tmp_path_factory.mktemp("system"), tempfile.gettempdir()
    with pytest.MonkeyPatch.context() as patch:
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # what stays there on purpose
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{usual}/torchinductor_{getpass.getuser()}")
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield
    remove()
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith(KEPT_BY_OTHERS))
    assert not left, f"left in the system's temporary folder: {left}. Use tmp_path, or lasting()"


@pytest.fixture(autouse=True, scope="module")
def recalled(request: pytest.FixtureRequest) -> Iterator[None]:
    """A model that another test captured, too, is recalled, unless a file is about capturing."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.path.stem.startswith(CAPTURING):
            for module in (peftfx, programs):
                patch.setattr(module, "capture", functools.partial(capture, cache=captures()))
        yield


@pytest.fixture(autouse=True)
def operators_read_once() -> None:
    """`torch.onnx` reads all its translations from their source at each export: once is enough."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is None:
        return
    apis: Any = registration.onnxscript_apis
    if not hasattr(apis.get_torchlib_ops, "cache_info"):
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()


@pytest.fixture(params=["encoder", "decoder"])
def hand(request: Any, captured: Any) -> tuple[str, Any, peftfx.Program]:
    """A hand-written model and its program."""
    model, program = captured[request.param]
    return request.param, model, program


@pytest.fixture(scope="session")
def captured() -> Captured:
    return Captured()


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """What the run draws its samples by: another one after each commit."""
    return int(pytestconfig.getoption("--seed") or 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo", action="store_true", help="run every method on all architectures")
    parser.addoption("--stacks", action="store_true", help="run every pair of methods")
    parser.addoption("--inductor", action="store_true", help="compile every method to code")
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt")
    parser.addoption("--seed", type=int, metavar="N", help="draws the samples (the commit's own)")
    parser.addoption("--method", metavar="NAME", help="only the registered tests of one method")
    parser.addoption(
        "--method-seconds", type=float, metavar="SECONDS",
        help=f"fail above so many CPU seconds for the registered tests of a method ({BUDGET:g})",
    )  # fmt: skip


def pytest_collection_finish() -> None:
    """What is imported stays: the collector of garbage need not look at it again and again, nor
    soon at what the session keeps."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:  # workers are given it as an option
        config.option.seed = commit()
    limit = config.getoption("--method-seconds")
    seconds = Seconds(BUDGET if limit is None else limit, strict=limit is not None)
    config.pluginmanager.register(seconds, "cpu-seconds")


def commit() -> int:
    """A number of the commit that is checked out; 0 without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return 0
    return int(done.stdout[:7] or "0", 16)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"Samples were drawn with --seed {config.getoption('--seed')}.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    method = config.getoption("--method")
    if method is None:
        return
    chosen = [item for item in items if method in methods_of(item)]
    if not chosen:
        raise pytest.UsageError(f"--method {method}: no registered test names that method")
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen
