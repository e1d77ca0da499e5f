"""What tells people how a run goes: a bar on stderr, and loggers through their own libraries."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..rewriter.errors import OptionError

Report = Callable[[int, float], None]
"""Called with the number of steps done and the last one's loss."""


class Logger(Protocol):
    """What writes figures down; a run of Weights & Biases is one."""

    def log(self, data: dict[str, Any], step: int) -> Any:
        """Takes figures by name (`train/loss`, `held_out/loss`, ...) after a number of steps."""


class _Scalars:
    """TensorBoard's writer as a `Logger`."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, data: Mapping[str, float], step: int) -> None:
        for name, figure in data.items():
            self.writer.add_scalar(name, figure, step)


@contextlib.contextmanager
def logging(loggers: Sequence[Any]) -> Iterator[Callable[[dict[str, float], int], None]]:
    """What writes figures to all loggers; those that were given by name are closed at the end.

    Args:
        loggers: objects with `log(data, step)`, such as `wandb.init(...)`; writers of TensorBoard;
            or `"tensorboard"` and `"wandb"` for new ones with their usual settings.

    Raises:
        OptionError: one is none of these, or its library is not installed.
    """
    with contextlib.ExitStack() as closing:
        all_of_them = [_logger(one, closing) for one in loggers]

        def log(data: dict[str, float], step: int) -> None:
            for one in all_of_them:
                one.log(data, step)

        yield log


def _logger(given: Any, closing: contextlib.ExitStack) -> Logger:
    if given == "tensorboard":
        writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter()
        closing.callback(writer.close)
        return _Scalars(writer)
    if given == "wandb":
        new = _library("wandb", "wandb").init()
        closing.push(lambda failed, *_: new.finish(int(failed is not None)))
        return new
    if hasattr(given, "add_scalar"):
        return _Scalars(given)
    if callable(getattr(given, "log", None)):
        return given
    raise OptionError(
        f"{given!r} is no logger. Give 'tensorboard', 'wandb', their writers and runs, or any "
        "object with log(data, step)."
    )


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptionError(
            f"{package} cannot be imported ({error}). Install it (pip install {package}), or leave "
            "it out of loggers."
        ) from error


@contextlib.contextmanager
def reporting(progress: bool | Report, total: int, done: int) -> Iterator[Report]:
    """The caller's own report, none, or a bar on stderr: steps, loss, speed, time left."""
    if not isinstance(progress, bool):
        yield progress
        return
    began = time.perf_counter()
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}  {task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=total, completed=done, loss="", speed="")

        def report(step: int, loss: float) -> None:
            pace = (step - done) / (time.perf_counter() - began)
            speed = f"{pace:.1f} steps/s" if pace >= 1 else f"{1 / pace:.1f} s/step"
            bar.update(task, completed=step, loss=f"loss {loss:.4f}", speed=speed)

        yield report
