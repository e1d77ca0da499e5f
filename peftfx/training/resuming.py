"""A run of `fit` in one file, from which the same call goes on, bit for bit.

It holds what training changes, the optimizer's and controllers' states, random states, where in the
batches the run was, losses, evaluations and the best values: safetensors with a hash over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..rewriter.errors import ArtifactError, BaseMismatchError, OptionError, RewriteError
from ..rewriter.files.files import write_file
from .held_out import Evaluation
from .loop import Loop
from .state import read_state, state_bytes
from .stream import Stream

FORMAT = "peftfx fit 1"


class Checkpoint:
    """Where a run is kept.

    Args:
        path: of the file, or None for a run that is not kept.
        every: steps between two; the last step is kept in any case.
    """

    def __init__(self, path: str | Path | None, every: int, loop: Loop) -> None:
        if every < 1:
            raise OptionError(f"save_every is {every}, but must be at least 1.")
        self.path = None if path is None else Path(path)
        self.every, self.loop = every, loop
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise OptionError(f"checkpoint={path}: the folder {self.path.parent} does not exist.")
        self.identity = loop.program.identity

    def after(self, done: int, stream: Stream, evaluation: Evaluation) -> None:
        """Writes the file after `done` steps if it is time."""
        loop = self.loop
        if self.path is None or (done % self.every and done != loop.settings.steps):
            return
        state = {
            "format": FORMAT, "recipe": self._recipe(), "base": self.identity,
            "settings": self._settings(), "losses": loop.losses,
            "figures": [list(figure) for figure in evaluation.figures],
            "values": loop.values(), "optimizer": loop.optimizer.state_dict()["state"],
            "stream": stream.state(), "best": evaluation.best or {},
        }  # fmt: skip
        write_file(self.path, state_bytes(state))

    def take_up(self, stream: Stream, evaluation: Evaluation) -> int:
        """Goes on from the file if there is one; how many steps are done.

        Raises:
            ArtifactError: the file is damaged, or of another recipe, base or other settings; the
                program is as it was.
        """
        if self.path is None or not self.path.exists():
            return 0
        state, loop = read_state(self.path), self.loop
        self._check(state)
        try:
            losses = [float(loss) for loss in state["losses"]]
            figures = [(int(step), float(figure)) for step, figure in state["figures"]]
            best, moving = state["best"], state["optimizer"]
            groups = loop.optimizer.state_dict()["param_groups"]
            loop.take_back(state["values"])
            loop.optimizer.load_state_dict({"state": moving, "param_groups": groups})
            stream.go_on(state["stream"])
        except RewriteError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"{self.path} does not fit this program ({str(error).splitlines()[0][:200]}). "
                "Give another checkpoint=, or remove the file to begin anew."
            ) from error
        loop.losses, evaluation.figures, evaluation.best = losses, figures, best or None
        return len(losses)

    def _check(self, state: Mapping[str, Any]) -> None:
        """Refuses what is no run of the same program with the same settings."""
        if state.get("format") != FORMAT:
            raise ArtifactError(f"{self.path} is no checkpoint of peftfx.fit. Give another path.")
        if state["recipe"] != self._recipe():
            raise ArtifactError(
                f"{self.path} is of {'; '.join(state['recipe'])}, but the program is "
                f"{'; '.join(self._recipe())}. Run the same recipe, or give another checkpoint=."
            )
        if state["base"] != self.identity:
            raise BaseMismatchError(f"{self.path} was written with other base weights.")
        now = self._settings()
        for name, was in state["settings"].items():
            if now.get(name) != was:
                raise ArtifactError(
                    f"{self.path} was begun with {name}={was}, not {now.get(name)}: going on would "
                    "be another run. Give the same, or another checkpoint=."
                )

    def _recipe(self) -> list[str]:
        return [r.text for r in self.loop.program.history]

    def _settings(self) -> dict[str, Any]:
        return {n: v if v is None else str(v) for n, v in asdict(self.loop.settings).items()}
