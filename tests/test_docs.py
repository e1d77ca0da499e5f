"""The README's Python runs, its commands exist, and documents name no file that is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from peftfx.cli import parser

ROOT = Path(__file__).parent.parent


def test_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block, most in zip(blocks, (17, 13, 5, 6, 10), strict=True):
        assert len([line for line in block.splitlines() if line.strip()]) <= most
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "sites edited; bounded" in printed and "MiB" in printed
    assert len(names["done"].losses) == 8
    assert (tmp_path / "plain" / "adapter_model.safetensors").is_file()
    written = (tmp_path / "classifier" / "adapter_config.json").read_text()
    assert '"classifier"' in written and '"trainable_token_indices"' in written
    assert names["program"].history[-1].text == "bake{names=[adalora]}"


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_page_for_users_of_peft_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "from-peft.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"from-peft.md, block {number}", "exec"), names)
    base, program, both = names["base"], names["program"], names["both"]
    assert program.adapters == ("lora",) and both.adapters == ("en", "fr")
    assert names["theirs"].adapters == ("theirs",) and names["french"].adapters == ("fr",)
    assert names["headed"].adapters == ("lora", "train", "ia3") and len(names["done"].losses) == 4
    for folder in ("peft-adapter", "merged", "both/base", "adapter"):
        assert (tmp_path / folder).is_dir()
    assert base.adapters == () and names["mixed"]["logits"].shape == (2, 9, 60)


def test_the_readme_names_real_commands() -> None:
    text = (ROOT / "README.md").read_text()
    known = parser().format_help()
    for command in set(re.findall(r"peftfx ([a-z]+) ", text)):
        assert f"    {command}" in known, command


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_linked_files_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def test_examples_of_words_use_them() -> None:
    """Each row of the table for authors names files that exist, and hold a word of the row."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("| the method ...")[1].split("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines()[2:]]
    assert len(rows) > 25
    for what, words, examples in rows:
        paths = [ROOT / p for p in re.findall(r"`([\w/]+\.py)`", examples)]
        found = [
            p if p.exists() else next((ROOT / "passes").glob(f"**/{p.relative_to(ROOT)}"))
            for p in paths
        ]
        told = {re.split(r"[(={]", w)[0].split(".")[-1] for w in re.findall(r"`([^`]+)`", words)}
        assert found and all(any(w in p.read_text() for w in told) for p in found), what
