"""Folds into files without a capture: the same bytes as with one, and only where that is certain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx import directories, many
from peftfx.cli import main
from peftfx.directories import to_directory
from peftfx.models import load_model
from peftfx.rewriter.edits.folding import apart
from peftfx.rewriter.errors import (
    BaseMismatchError,
    FoldError,
    OptionError,
    PathError,
    VerifyError,
)
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
    ("llama", "peft", "vera{rank=4,where=linear and not head}"),
    ("llama", "peft", "vb_lora{rank=2,length=8,vectors=16,where=q|ffn.up}"),
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


@pytest.mark.parametrize(
    "recipe", ["vera{rank=4}", "vb_lora{length=8}", "said{dimension=200,where=linear}"]
)
def test_what_shared_tensors_make_is_folded_as_in_memory(
    made: Any,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is ours: with a captured model; its own files alone do not tell a merge."""
    root, program = made("llama")
    adapted = randomise(peftfx.run(program, recipe), 0.3)
    peftfx.save(adapted, tmp_path / "adapter")
    monkeypatch.setattr(directories, "capture", lambda *_, **__: program)
    done = to_directory(root / "base", tmp_path / "done", tmp_path / "adapter")
    want, got = peftfx.run(adapted, "fold").export_state_dict(), Checkpoint.read(tmp_path / "done")
    assert len(done.changed) >= 4 and all(torch.equal(got.tensor(n), t) for n, t in want.items())
    with pytest.raises(FoldError, match="--to peft"):
        to_directory(root / "base", tmp_path / "rest", tmp_path / "adapter", rank=2)
    typed = [str(p) for p in (root / "base", tmp_path / "adapter", tmp_path / "done")]
    assert main(["check-merge", *typed]) == 2 and "--to peft" in capsys.readouterr().err


def test_what_is_beside_no_weight_is_refused(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, program = made("llama")
    peftfx.save(peftfx.run(program, "said{dimension=200}"), tmp_path / "adapter")
    monkeypatch.setattr(directories, "capture", lambda *_, **__: program)
    with pytest.raises(FoldError, match=r"changes a norm, .* --out merged\.safetensors"):
        to_directory(root / "base", tmp_path / "done", tmp_path / "adapter")


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


def left_beside(
    made: Any, tmp_path: Path, recipe: str = "lora{rank=3,where=linear and not head}", **mode: Any
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Folds weights in part: (what was done, and in float64 the base, what the branches compute,
    and what the directory with its adapter computes)."""
    root, program = made("llama")
    adapted = randomise(peftfx.run(program, recipe), 1e-3)
    peftfx.save_peft(adapted, tmp_path / "adapter")
    done = to_directory(root / "base", tmp_path / "done", tmp_path / "adapter", **mode)
    old = matrices(root / "base", None)
    return (
        done, old, matrices(root / "base", tmp_path / "adapter"),
        matrices(tmp_path / "done", tmp_path / "done" / "adapter"),
    )  # fmt: skip


def matrices(folder: Path, adapter: Path | None) -> dict[str, Tensor]:
    """The matrices of a checkpoint, with a LoRA of PEFT, in float64."""
    stored = {n: t.double() for n, t in Checkpoint.read(folder).all_mapped().items()}
    if adapter is not None and adapter.exists():
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        scale = config["lora_alpha"] / config["r"]
        assert not config["alpha_pattern"] and not config["rank_pattern"]
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name, a in tensors.items():
            if "lora_A" in name:
                b = tensors[name.replace("lora_A", "lora_B")].double()
                target = name.removeprefix("base_model.model.").replace("lora_A.", "")
                stored[target] = stored[target] + scale * b @ a.double()
    return {n: t for n, t in stored.items() if t.dim() == 2}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def off(want: dict[str, Tensor], got: dict[str, Tensor], old: dict[str, Tensor]) -> float:
    """The largest error of a change, relative to it."""
    changed = [n for n in want if not torch.equal(want[n], old[n])]
    assert len(changed) == 14
    return max(float((want[n] - got[n]).norm() / (want[n] - old[n]).norm()) for n in changed)


def test_what_rounding_would_lose_stays_beside_the_files(made: Any, tmp_path: Path) -> None:
    done, old, want, got = left_beside(made, tmp_path, rank=3)
    assert len(done.beside) == 14 and off(want, got, old) < 1e-6
    folded = matrices(tmp_path / "done", None)
    assert all(torch.equal(folded[n], old[n]) for n in old)  # all of it is of rank 3
    assert "At 14 weights" in (tmp_path / "done" / "README.md").read_text()
    other, old, want, got = left_beside(made, tmp_path / "less", rank=1)
    plain = left_beside(made, tmp_path / "plain")
    lost = off(plain[2], matrices(tmp_path / "plain" / "done", None), plain[1])
    assert 1e-3 < off(want, got, old) < lost and not other.nothing_to_do
    with pytest.raises(PathError, match="with other options"):
        left_beside(made, tmp_path / "less", rank=2)
    again = left_beside(made, tmp_path / "less", rank=1)[0]
    assert again.nothing_to_do and again.beside == other.beside


def test_branches_stay_where_too_little_would_survive(made: Any, tmp_path: Path) -> None:
    done, old, want, got = left_beside(made, tmp_path, least=1.0)
    assert len(done.beside) == 14 and done.changed == [] and off(want, got, old) == 0
    done = left_beside(made, tmp_path / "few", least=0.02)[0]
    assert done.beside == [] and len(done.changed) == 14
    assert not (tmp_path / "few" / "done" / "adapter").exists()


def test_what_stays_beside_is_the_same_after_a_kill(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = left_beside(made, tmp_path, rank=2)[0]
    files = everything(tmp_path / "done")
    root = made("llama")[0]
    shards = Checkpoint.read(root / "base").shards
    last = [*shards][-1]

    def stop(file: str) -> None:
        if file == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_directory(root / "base", tmp_path / "out", tmp_path / "adapter", rank=2, progress=stop)
    done = to_directory(root / "base", tmp_path / "out", tmp_path / "adapter", rank=2)
    assert len(done.resumed) == len(shards) - 1 > 1 and done.beside == want.beside
    assert everything(tmp_path / "out") == files


def test_what_cannot_stay_is_refused(made: Any, tmp_path: Path) -> None:
    root, program = made("llama")
    peftfx.save(randomise(peftfx.run(program, "ia3"), 0.05), tmp_path / "ia3")
    with pytest.raises(FoldError, match="nothing can stay beside"):
        to_directory(root / "base", tmp_path / "out", tmp_path / "ia3", rank=2)
    with pytest.raises(OptionError, match="allow-base-mismatch"):
        to_directory(
            root / "base", tmp_path / "out", tmp_path / "ia3", rank=2, allow_base_mismatch=True
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--mode", "residual", "--rank", "0"], "--rank at least 1"),
        (["--mode", "keep", "--least", "1.5"], "at most 1"),
        (["--rank", "4"], "--rank goes with --mode residual"),
        (["--mode", "residual", "--least", "0.5"], "--least goes with --mode keep"),
    ],
)
def test_what_is_typed_wrong_is_told_first(
    typed: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fold", str(tmp_path), "none", "--out", str(tmp_path / "out"), *typed]) == 2
    assert said in capsys.readouterr().err
    file = ["--out", str(tmp_path / "out.safetensors"), "--mode", "keep"]
    assert main(["fold", str(tmp_path), "none", *file]) == 2
    assert "give --out DIR" in capsys.readouterr().err


def test_the_command_line_leaves_an_adapter_beside(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_beside(made, tmp_path, rank=3)
    out = tmp_path / "typed"
    typed = ["fold", str(made("llama")[0] / "base"), str(tmp_path / "adapter"), "--out", str(out)]
    assert main([*typed, "--mode", "residual", "--rank", "3"]) == 0
    assert "at 14 weights" in capsys.readouterr().out
    assert everything(out / "adapter") == everything(tmp_path / "done" / "adapter")


@pytest.mark.parametrize("mode", [{"rank": 1}, {"rank": 3}, {"least": 1.0}])
def test_a_check_of_a_merge_counts_what_stays_beside(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: dict[str, Any]
) -> None:
    left_beside(made, tmp_path, **mode)
    done, rest = tmp_path / "done", tmp_path / "done" / "adapter"
    typed = ["check-merge", str(made("llama")[0] / "base"), str(tmp_path / "adapter"), str(done)]
    assert main([*typed, "--json", "--all"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["with adapter/"] == 14 and said["rest"] == str(rest)
    present = [t["present"] for t in said["tensors"] if t["state"] == "with adapter/"]
    assert present == pytest.approx([1.0] * 14, abs=0.1)
    assert main(typed) == 0 and "was not folded, and counts" in capsys.readouterr().out
    stored = rest / "adapter_model.safetensors"
    tensors, name = load_file(stored), "base_model.model.lm_head.lora_B.weight"
    doubled = {n: t * 2 if "layers.1.mlp.up_proj.lora_B" in n else t for n, t in tensors.items()}
    save_file(doubled, stored, {"format": "pt"})
    assert name not in tensors and main([*typed, "--json"]) == 1
    (wrong,) = json.loads(capsys.readouterr().out)["tensors"]
    assert wrong["state"] == "differs" and "layers.1.mlp.up_proj" in wrong["name"]
    shutil.rmtree(rest)
    assert main([*typed, "--json"]) == 4
    assert "is missing: peftfx-fold.json says" in json.loads(capsys.readouterr().out)["error"]
