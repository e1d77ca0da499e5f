"""CPU seconds of a test run: by folder, by file and by method, printed at the end of it.

A method pays for the tests that are run on it because it is registered, which are those with its
name in a parameter of `ARGUMENTS`; a test of several methods is shared by them. Its own file in
`tests/methods` is its author's. More than the budget is said, and fails a run with `--method-seconds`
(a loaded machine takes longer, which is no fault of a method). What a fixture makes once for
many tests (`shared`) is a row of its own, and nobody's.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest

from .recipes import METHODS

ARGUMENTS = ("method", "methods", "name", "pair", "one", "two")
BUDGET = 12.0
"""Seconds that the registered tests of one method may take."""
FILES = 20
"""How many files are listed; each folder's sum holds the others, too."""
SHARED = "(what fixtures share)"
REST = "(imports and collection)"

_shared = [0.0]


def spent() -> float:
    """CPU seconds of this process and of the processes that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """What is computed here serves many tests: the one that needs it first does not pay for it."""
    before, inner = spent(), _shared[0]
    try:
        yield
    finally:
        # What an inner `shared` counted is part of this one's time.
        _shared[0] = inner + spent() - before


def methods_of(item: Any) -> tuple[str, ...]:
    """The methods that a test's parameters name, alone, in a tuple, or as the first word."""
    parameters: Mapping[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    names: list[str] = []
    for value in (parameters[a] for a in ARGUMENTS if a in parameters):
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str):
                names += [each.partition(" ")[0]]
    return tuple(dict.fromkeys(n for n in names if n in METHODS))


class Seconds:
    """A plugin: measures in the process that runs a test, adds up in the one that reports.

    Args:
        budget: seconds that one method may take.
        strict: more of them fails the run.
    """

    def __init__(self, budget: float, strict: bool) -> None:
        self.budget, self.strict = budget, strict
        self.files: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.tests: dict[str, Counter[str]] = {}
        self.phase = (0.0, 0.0)
        self.first = spent()

    @property
    def expensive(self) -> dict[str, float]:
        """Methods above the budget, and their seconds."""
        return {n: s for n, s in sorted(self.methods.items()) if s > self.budget}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Seconds since the report before, as attributes that also travel between processes."""
        report: Any = yield
        now = spent(), _shared[0]
        aside = now[1] - self.phase[1]
        report.cpu, report.aside = now[0] - self.phase[0] - aside, aside
        report.methods = list(methods_of(item))
        self.phase = now
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.phase = spent(), _shared[0]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.files[report.nodeid.partition("::")[0]] += report.cpu
        self.files[SHARED] += report.aside
        for name in report.methods:
            share = report.cpu / len(report.methods)
            self.methods[name] += share
            self.tests.setdefault(name, Counter())[report.nodeid] += share

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.files[REST] += getattr(node, "workeroutput", {}).get("cpu", 0.0)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: Any) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["cpu"] = spent() - sum(self.files.values())
        elif self.strict and self.expensive and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not hasattr(terminalreporter.config, "workerinput"):
            for line in self.lines():
                terminalreporter.write_line(line)

    def lines(self) -> Iterator[str]:
        """The tables."""
        folders: Counter[str] = Counter()
        for name, seconds in self.files.items():
            folders[name if name[0] == "(" else str(PurePosixPath(name).parent)] += seconds
        files = Counter({n: s for n, s in self.files.items() if n[0] != "("})
        yield f"CPU seconds: {sum(folders.values()):.0f}"
        for table in (folders.most_common(), files.most_common(FILES)):
            yield ""
            yield from (f"{seconds:9.1f}  {name}" for name, seconds in table)
        if self.methods:
            yield f"\n   method  registered tests (budget {self.budget:g})"
        for name, seconds in self.methods.most_common():
            yield f"{seconds:9.1f}  {name}"
        for name, seconds in self.expensive.items():
            yield (
                f"The registered tests of {name} take {seconds:.1f} CPU seconds, above the "
                f"budget of {self.budget:g}. Give its golden text a smaller recipe. Most take:"
            )
            for test, part in self.tests[name].most_common(8):
                yield f"{part:9.1f}  {test}"
