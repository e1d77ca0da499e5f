"""The public program: a captured model, what passes did to it, and what can be asked of it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from .axes.named import named_axes
from .program.generate import generate
from .program.history import Certificate
from .program.state import State
from .program.stored import Stored, stored
from .program.summary import summary
from .program.text import diff_text, program_text
from .run.recheck import verify_program
from .run.replay import only, without
from .training.memory import Memory, memory
from .weights.exported import export_state_dict


@dataclass(eq=False, repr=False)
class Program(State):
    """A captured model. `peftfx.run` returns new programs; it never changes one.

    Its attributes are described in `program/state.py`.
    """

    def text(self, axes: bool = False) -> str:
        """The graph as stable, readable text: one line a node.

        Args:
            axes: what lies along the axes of every value and stored tensor, too (see
                `axes/named.py`): `batch, token, head*width`, and `?` for what is not known.
        """
        return program_text(self, named_axes(self).words if axes else None)

    def diff(self, other: State | None = None) -> str:
        """What changed from `other` (default: the captured program) as a unified diff of text,
        with the counts of added nodes, sites and trainable parameters."""
        return diff_text(other or self.origin or self, self)

    def __str__(self) -> str:
        """The program in a few lines; `text()` is the graph."""
        return summary(self)

    def _repr_html_(self) -> str:
        """The same, for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def stored(self, name: str) -> Stored:
        """What is known of a stored tensor beside its values: who reads it, by which names, who
        trains it, what it was at capture.

        Args:
            name: any of its names in the original model, or that of a branch's tensor.

        Raises:
            PassError: the program has no such tensor.
        """
        return stored(self, name)

    def verify(self) -> list[Certificate]:
        """Checks the graph and measures every contract of the history again.

        Raises:
            VerifyError: the graph is malformed or a measured contract does not hold.
        """
        return verify_program(self)

    def memory(
        self, batch: int | None = None, seq: int | None = None, *, optimizer: str = "adamw",
        **sizes: int,
    ) -> Memory:  # fmt: skip
        """What training keeps, in the program's mode, without running or allocating anything.

        Args:
            batch, seq: rows, and tokens of every sequence; what the program's spec calls `batch`
                and `sequence`.
            optimizer: name of a torch optimizer, see `training/memory.STATES`.
            sizes: other dynamic sizes, or single ones, by the names in `program.spec`.

        Raises:
            InputError: a size is missing, unknown or out of range.
            OptionError: an unknown optimizer.
            PassError: a size inside the model depends on values.
        """
        return memory(self, {"batch": batch, "sequence": seq}, sizes, optimizer)

    # Getting results out.

    def export_state_dict(self, strict: bool = True) -> dict[str, Tensor]:
        """The tensors under their original names, in their original dtypes; loads into the
        original, unmodified model.

        A quantised weight is written as the dense matrix that it stands for.

        Args:
            strict: refuse if the program holds tensors that the original model has no name
                for (branches not folded, added biases), or that do not fit it any more (cut
                channels); False returns them too.

        Raises:
            ExportError: such tensors exist; the message lists them.
        """
        return export_state_dict(self, strict)

    def without(self, name: str) -> Self:
        """The program without one adapter, or without the steps of a pass that inserts none (such
        as `quantise`), rebuilt from the captured base; what is left keeps its current values.

        Raises:
            PassError: there is no such adapter or pass, or adapters have the shapes that the pass
                gave them.
        """
        return without(self, name)

    def only(self, names: tuple[str, ...]) -> Self:
        """The program with just the named adapters, rebuilt exactly from the captured base."""
        return only(self, names)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        eos_token_id: int | tuple[int, ...] | None = None,
        pad_token_id: int | None = None,
        **given: Tensor,
    ) -> Tensor:
        """Greedy continuation without a cache.

        Args:
            input_ids: `[batch, sequence]` integer prompt (pad on the left).
            attention_mask: `[batch, sequence]`, 1 for real tokens; needed if it was captured.
            max_new_tokens: how many tokens to add at most.
            eos_token_id: stops a row (default: the model's own, if it has one).
            pad_token_id: fills rows that have stopped (default: the model's, else the first end).
            given: other inputs, the same at each step, such as a bank's adapter ids.

        Returns:
            Prompt and continuation, `[batch, sequence + new]`.

        Raises:
            InputError: the program does not return logits per token.
        """
        ends = eos_token_id, pad_token_id
        return generate(self, input_ids, attention_mask, max_new_tokens, *ends, given)
