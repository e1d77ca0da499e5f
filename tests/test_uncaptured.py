"""Folds into files without a capture: the same bytes as with one, and only where that is certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx import directories, many
from peftfx.directories import to_directory
from peftfx.models import load_model
from peftfx.rewriter.edits.folding import apart
from peftfx.rewriter.errors import BaseMismatchError, FoldError, VerifyError
from peftfx.rewriter.storage.folding import LayoutFolder
from peftfx.rewriter.storage.safetensors_checkpoint import Checkpoint
from peftfx.rewriter.tracing.reads import layout_of

from .models import batch, randomise
from .test_stream import MODELS, edit_shard, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name, (its directory with a sharded bfloat16 checkpoint in `base`, the program)."""
    known: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model: Any = MODELS[name]().to(torch.bfloat16).eval()
            model.save_pretrained(root / "base", max_shard_size="20KB")
            known[name] = root, peftfx.capture(model, kwargs=batch())
        return known[name]

    return get


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("captured")


CASES = (
    ("llama", "peft", "lora{rank=3,where=linear and not head}"),
    ("llama", "peft", "dora{rank=2,where=q|ffn.up};train{where=head}"),
    ("llama", "peftfx", "lora{rank=2};lora{rank=3,name=more}"),
    ("llama", "peftfx", "dora{rank=2};train{where=norm}"),
    ("gpt2", "peft", "lora{rank=3,where=o|ffn.up|ffn.down}"),
    ("llama", "peft", "loha{rank=2}"),
    ("llama", "peftfx", "lokr{rank=2};oft{block=4}"),
    ("gpt2", "peft", "oft{block=8,where=o|ffn.up|ffn.down}"),
    ("llama", "peft", "boft{block=8}"),
)


@pytest.mark.parametrize(("name", "form", "recipe"), CASES)
def test_the_same_bytes_as_of_a_captured_model(
    made: Any, name: str, form: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, program = made(name)
    adapted = randomise(peftfx.run(program, recipe), 0.05)
    save: Any = peftfx.save if form == "peftfx" else peftfx.save_peft
    adapters = list(adapted.adapters)
    save(adapted, tmp_path / "adapter", *([] if form == "peftfx" else [adapters]))
    with monkeypatch.context() as patch:
        patch.setattr(directories, "_uncaptured", lambda *_: None)
        patch.setattr(directories, "capture", lambda *_, **__: program)
        patch.setattr(directories, "load_weights", lambda captured, _: captured)
        want = to_directory(root / "base", tmp_path / "want", tmp_path / "adapter")
    monkeypatch.setattr(directories, "capture", refuse)
    monkeypatch.setattr(many, "capture", refuse)
    done = to_directory(root / "base", tmp_path / "done", tmp_path / "adapter")
    assert len(want.changed) >= 4 and done.changed == want.changed
    assert {*done.shares} == {s.partition(":")[0] for s in want.shares}
    weights = [p.name for p in (root / "base").glob("*.safetensors")]
    got, wanted = tree(tmp_path / "done"), tree(tmp_path / "want")
    assert got["README.md"] == wanted["README.md"] and b"folded in" in got["README.md"]
    assert got.keys() == wanted.keys() and all(got[n] == wanted[n] for n in weights)
    (outcome,) = many.fold_all(root / "base", [tmp_path / "adapter"], tmp_path / "all")
    assert outcome.status == "done" and tree(tmp_path / "all" / "adapter") == got


@pytest.mark.parametrize("recipe", ["lora{where=head}", "ia3", "lora{where=embedding.token}"])
def test_what_files_do_not_tell_is_captured(
    made: Any, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, program = made("gpt2")  # whose head is its table of tokens
    peftfx.save(randomise(peftfx.run(program, recipe), 0.05), tmp_path / "adapter")
    monkeypatch.setattr(directories, "capture", refuse)
    with pytest.raises(AssertionError, match="captured"):
        to_directory(root / "base", tmp_path / "out", tmp_path / "adapter")


def test_another_base_is_refused(made: Any, tmp_path: Path) -> None:
    root, program = made("llama")
    peftfx.save(randomise(peftfx.run(program, "lora")), tmp_path / "adapter")
    own = tmp_path / "own"
    own.mkdir()
    for path in (root / "base").iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    edit_shard(sorted(own.glob("*.safetensors"))[-1], lambda t: next(iter(t.values())).add_(1.0))
    with pytest.raises(BaseMismatchError, match="other base weights"):
        to_directory(own, tmp_path / "out", tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "own"]


def test_a_wrong_rule_is_caught(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, program = made("llama")
    peftfx.save(randomise(peftfx.run(program, "lora"), 0.05), tmp_path / "adapter")
    right = apart.folded

    def wrong(weight: Any, branch: Any) -> Any:
        def change(block: Tensor, rows: slice) -> None:
            block[0, 0] += 0.5 if rows.start == 0 else 0.0

        return right(weight, branch).with_rows_changed(change)

    monkeypatch.setattr(apart, "folded", wrong)
    with pytest.raises(VerifyError, match="off by more than rounding"):
        to_directory(root / "base", tmp_path / "out", tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


class Readers(nn.Module):
    """Linears that are also read in another way, tied, scaled, or fine."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("fine", "normed", "cast", "tied", "other"):
            setattr(self, name, nn.Linear(4, 4))
        self.tied.weight = self.other.weight  # pyright: ignore
        self.table = nn.Parameter(torch.randn(4, 4))
        self.scaled = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fine(x) if self.fine.weight.shape[0] == 4 else x  # pyright: ignore
        x = self.normed(x) / self.normed.weight.norm()  # pyright: ignore
        x = F.linear(x, self.cast.weight.float()) + self.tied(x)  # pyright: ignore
        x = torch.addmm(x, x, self.table)
        return torch.addmm(x, x, self.scaled, alpha=2)


def test_readers_of_matrices_are_told() -> None:
    with torch.device("meta"):
        model = Readers()
    layout = layout_of(model, {"x": torch.randn(2, 4)})
    assert layout is not None
    assert layout.matrices == {"fine.weight": False, "table": True}
    assert layout.aliases == {"other.weight": "tied.weight"}
    assert layout_of(model, {"wrong": torch.randn(2, 4)}) is None


def test_a_missing_tensor_is_an_error(made: Any, tmp_path: Path) -> None:
    root, _ = made("llama")
    layout = load_model(str(root / "base"), hollow=True).layout()
    assert layout is not None and len(layout.matrices) == 2 * 7 + 1
    folder = LayoutFolder(
        layout, Checkpoint.read(root / "base"),
        {"model.layers.0.self_attn.q_proj.weight": []}, {}, "",
    )  # fmt: skip
    with pytest.raises(FoldError, match=r"q_proj\.weight: its weight is not in the checkpoint"):
        folder.finish()
