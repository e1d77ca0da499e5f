"""Calls outside of the modes of torch that the caller happens to be in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Lets what a function makes be trained, although it is called in inference mode, and lets it
    compute in the dtypes that are there, although it is called under autocast."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as outside:
            if torch.is_inference_mode_enabled():
                outside.enter_context(torch.inference_mode(False))
                outside.enter_context(torch.no_grad())
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "xpu", "mps")):
                outside.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return called
