"""The README's Python runs, its commands exist, and documents name no file that is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peftfx.cli import _parser

ROOT = Path(__file__).parent.parent


def test_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 17
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "sites edited; bounded" in capsys.readouterr().out


def test_the_readme_names_real_commands() -> None:
    text = (ROOT / "README.md").read_text()
    known = _parser().format_help()
    for command in set(re.findall(r"peftfx ([a-z]+) ", text)):
        assert f"    {command}" in known, command


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_linked_files_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target
