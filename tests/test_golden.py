"""Golden graph text: what each pass does to a hand-written model, line by line, with edit counts.

`pytest --update-golden` rewrites the files; review the difference before committing it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftfx
from peftfx.rewriter.running.passes import REGISTRY

FOLDER = Path(__file__).parent / "golden"
TEXTS = {
    "lora": "lora{rank=2}", "ia3": "ia3", "serial_adapter": "serial_adapter{bottleneck=4}",
    "prefix_tuning": "prefix_tuning{length=3}", "prompt_tuning": "prompt_tuning{length=3}",
    "bitfit": "bitfit", "fold": "lora{rank=2};ia3;fold{names=[lora]}",
    "lower": "lora{rank=2};lower", "causal": "causal",
}  # fmt: skip


def test_every_pass_has_a_golden_text() -> None:
    assert set(TEXTS) == set(REGISTRY)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_golden(captured: Any, name: str, request: pytest.FixtureRequest) -> None:
    _, base = captured["decoder"]
    got = f"# {TEXTS[name]}\n{peftfx.run(base, TEXTS[name]).diff()}"
    path = FOLDER / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(got)
    assert path.read_text() == got
