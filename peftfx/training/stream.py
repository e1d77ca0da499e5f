"""The batches of each step of `fit`, in an order that a later run can go on with.

A round through the batches depends on torch's random numbers alone (a shuffling `DataLoader` draws
its order when a round begins), so the state at the begin of the round and the number of batches
since then say which one comes next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..rewriter.errors import OptionError


class Stream:
    """Batches in groups, from the start again whenever they run out.

    Attributes:
        taken: batches of this round so far.
        began: the random state when this round began.
    """

    def __init__(self, batches: Iterable[Any], accumulate: int, steps: int) -> None:
        self.batches, self.accumulate, self.steps = batches, accumulate, steps
        self.taken = 0
        self.began: Mapping[str, Tensor] = {}
        self._resumed: Mapping[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Where the stream is, and the random numbers that come next."""
        return {"taken": self.taken, "began": dict(self.began), "now": self._random()}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Lets `groups` begin where `state` was taken."""
        self._resumed = state

    def groups(self, start: int) -> Iterator[list[Any]]:
        """The batches of each step from `start` on.

        Raises:
            OptionError: they end and cannot be gone through again.
        """
        source = self._endless()
        for step in range(start, self.steps):
            group = list(itertools.islice(source, self.accumulate))
            if len(group) < self.accumulate:
                raise OptionError(
                    f"batches ended in step {step + 1} of {self.steps} and cannot be gone through "
                    "again. Give a list or DataLoader, or fewer steps. The steps done are kept."
                )
            yield group

    def _endless(self) -> Iterator[Any]:
        skip = 0
        if self._resumed is not None:
            skip = int(self._resumed["taken"])
            self._set(self._resumed["began"])
        while True:
            self.began, self.taken = self._random(), 0
            for batch in self.batches:
                self.taken += 1
                if self.taken > skip:
                    yield batch
                elif self.taken == skip and self._resumed is not None:
                    self._set(self._resumed["now"])
            if not self.taken:
                return
            skip = 0

    def _random(self) -> dict[str, Tensor]:
        state = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        if isinstance(own := getattr(self.batches, "generator", None), torch.Generator):
            state["loader"] = own.get_state()
        return state

    def _set(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        own = getattr(self.batches, "generator", None)
        if "loader" in state and isinstance(own, torch.Generator):
            own.set_state(state["loader"])
