"""What becomes of adapters of PEFT, type by type and target by target, as a table.

    python -m tests.formats.matrix      writes it into `docs/peft-types.md`

Each cell is tried on a small model: `=` computes what PEFT computes, `~` is of a given rank and tells
what that loses, `no` is an error that says what to do.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftfx
from peftfx.exporters.adapter_changes import describe
from peftfx.exporters.base import checkpoint
from peftfx.exporters.formats import convert, load_adapter, save_adapter
from peftfx.rewriter.errors import RewriteError

from .peft_cases import CASES, base, inputs, output, program, write

PAGE = Path(__file__).parents[2] / "docs" / "peft-types.md"
HEAD = "| what is read | "

ROWS: dict[str, str] = {
    "`LORA`": "patterns", "`LORA`, `use_dora`": "dora", "`LORA`, `pissa`": "pissa",
    "`LORA`, `bias`": "own biases", "`LORA`, `modules_to_save`": "head saved",
    "`LORA`, `trainable_token_indices`": "token rows", "`ADALORA`": "adalora", "`VERA`": "vera",
    "`VBLORA`": "vblora",
    "`DELORA`": "delora", "`IA3`": "ia3", "`PREFIX_TUNING`": "prefix", "`CARTRIDGE`": "cartridge",
    "`PROMPT_TUNING`": "prompt", "`P_TUNING`": "p-tuning",
    "`MULTITASK_PROMPT_TUNING`": "multitask", "`LN_TUNING`": "norms", "`BEFT`": "beft",
    "`TRAINABLE_TOKENS`": "rows", "`LOHA`": "loha", "`LOKR`": "lokr", "`SHIRA`": "shira",
    "`MISS`": "miss", "`C3A`": "c3a", "`OFT`": "exact oft", "`BOFT`": "boft", "`HIRA`": "hira",
    "`HRA`": "orthogonal hra",
}  # fmt: skip
"""What is read -> a case of `peft_cases`."""

FILES = ("peft", "plain-lora", "kohya", "gguf", "onnx_adapter")
CAPTURED = ("adapterhub", "peftfx")
COLUMNS = ("inspect", "fold", *FILES, *CAPTURED)

REMEDY = re.compile(
    r"\b(Add|Ask|Capture|Choose|Convert|Export|Fold|Give|Insert|Leave|Load|Merge|Read|Save|Say|Select"
    r"|Take|Train|Untie|Use|Write)\b"
)


class Adapter:
    """One case, written by PEFT.

    Args:
        case: of `peft_cases`.
        place: a directory of its own.
    """

    def __init__(self, case: str, place: Path) -> None:
        self.name, self.place = CASES[case][0], place
        self.want = write(case, place / "theirs")
        self.read = load_adapter(program(self.name), place / "theirs")
        self.model = place / "model"
        base(self.name).save_pretrained(self.model)

    def computed(self, made: peftfx.Program) -> Tensor:
        return output(made(**inputs(self.name)))

    def cell(self, column: str) -> str:
        """What becomes of it.

        Raises:
            AssertionError: the result computes something else, or an error says no remedy.
        """
        tries = {"inspect": self._inspected, "fold": self._folded}
        try:
            return tries.get(column, lambda: self._written(column))()
        except RewriteError as error:
            assert REMEDY.search(str(error)), (self.name, column, str(error))
            return "no"

    def _inspected(self) -> str:
        described = describe(self.place / "theirs", checkpoint(self.model))
        assert described.places
        return "="

    def _folded(self) -> str:
        folded = peftfx.run(self.read, "fold")
        if folded.attachments:
            return "no"
        self._require_equal(folded)
        return "="

    def _written(self, to: str) -> str:
        try:
            return self._as(to, None)
        except RewriteError as error:
            if "rank" not in str(error) or to not in FILES[1:]:
                raise
        return self._as(to, 8)

    def _as(self, to: str, rank: int | None) -> str:
        path = self.place / f"as-{to}"
        if to in CAPTURED:
            lost = save_adapter(self.read, path, to, rank=rank)
        else:
            lost = convert(self.place / "theirs", path, to, self.model, rank)
        again = load_adapter(program(self.name), path)
        if lost:
            return "~"
        self._require_equal(again)
        return "="

    def _require_equal(self, made: peftfx.Program) -> None:
        gap = float((self.computed(made) - self.want).abs().max() / self.want.abs().max())
        assert gap < 1e-5, (self.name, gap)


def row(label: str, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """The cells of what is read, by column."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = Adapter(ROWS[label], Path(place))
        return {column: adapter.cell(column) for column in columns}


def table() -> dict[str, dict[str, str]]:
    """What the page says: what is read -> column -> cell."""
    lines = PAGE.read_text().partition(HEAD)[2].splitlines()
    columns = [c.strip(" `") for c in lines[0].strip(" |").split("|")]
    rows = (line.strip(" |").split(" | ") for line in lines[2:])
    return {label: dict(zip(columns, cells, strict=True)) for label, *cells in rows}


def main() -> None:
    torch.set_num_threads(1)
    names = " | ".join(c if c in COLUMNS[:2] else f"`{c}`" for c in COLUMNS)
    lines = [f"{HEAD}{names} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for label in ROWS:
        cells: dict[str, Any] = row(label)
        lines.append(f"| {label} | {' | '.join(cells.values())} |")
        print(lines[-1], flush=True)
    text = PAGE.read_text().partition(HEAD)[0]
    PAGE.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
