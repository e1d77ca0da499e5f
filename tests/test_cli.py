"""The command line: every command, `--json`, and one readable line for every user error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftfx
from peftfx.cli import main

from .models import Decoder, batch, bert, randomise


def tiny() -> Any:
    torch.manual_seed(0)
    return Decoder().eval(), batch()


def broken() -> Any:
    return 3


TINY = f"{__name__}:tiny"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_sites_print_diff_and_verify(run: Any) -> None:
    code, out, _ = run("sites", TINY, "--where", "(q|v) and layer>=1")
    assert code == 0 and "layers.1.q_proj.weight" in out and "2 of 29 sites" in out
    code, out, _ = run("sites", TINY, "--json")
    assert {s["role"] for s in json.loads(out)} >= {"q", "ffn.gate", "head", "token", "norm"}
    code, out, _ = run("print", TINY)
    assert out.startswith("program Decoder(input_ids: i64[batch, sequence]")
    code, out, _ = run("diff", TINY, "lora{rank=2,where=q}")
    assert "+2 sites" in out and "+  %lora.layers.0.q_proj.delta" in out
    code, out, _ = run("verify", TINY, "lora;ia3")
    assert code == 0 and out.splitlines()[:2] == [
        "ok  1 lora: identity: max_abs 0, max_rel 0", "ok  2 ia3: identity: max_abs 0, max_rel 0",
    ]  # fmt: skip
    assert out.splitlines()[2].startswith("ok  all passes: replayed: ")
    assert "lora" in run("passes")[1]


def test_data_of_a_pass_comes_from_a_file(run: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, 20, (5, 7), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    save_file(given, tmp_path / "data.safetensors")
    recipe = "lora{rank=2,where=q,init=eva}"
    code, _, err = run("run", TINY, recipe)
    assert code == 2 and "--data FILE of peftfx run" in err
    args = ("--data", tmp_path / "data.safetensors", "--batch", 2, "--out", tmp_path / "a")
    assert run("run", TINY, recipe, *args)[0] == 0
    model, example = tiny()
    parts = [{n: t[i : i + 2] for n, t in given.items()} for i in (0, 2, 4)]
    made = peftfx.run(peftfx.capture(model, kwargs=example), recipe, data=parts)
    stored = load_file(tmp_path / "a" / "tensors.safetensors")
    trained = [p for p in made.trainable_parameters() if p.dim() == 2 and p.any()]
    assert trained and all(any(torch.equal(p, t) for t in stored.values()) for p in trained)
    save_file(given | {"input_ids": ids[:3].clone()}, tmp_path / "data.safetensors")
    code, _, err = run("run", TINY, recipe, *args)
    assert code == 2 and "input_ids 3" in err and "as many samples of each input" in err
    assert run("run", TINY, recipe, *args[:2], "--batch", 0)[0] == 2


def test_methods_are_one_full_line_each_in_a_pipe(run: Any) -> None:
    found = json.loads(run("methods", "--json")[1])
    lines = run("methods")[1].splitlines()
    assert lines[0].split() == ["method", "class", "inserts", "folds", "paper"]
    assert len(lines) == 1 + len(found)
    for line, entry in zip(lines[1:], found, strict=True):
        cells = (entry[k] for k in ("name", "group", "inserts", "folds", "paper"))
        assert re.split(r"\s{2,}", line) == [*cells]


def test_run_fold_and_export(run: Any, tmp_path: Path) -> None:
    adapter, merged, model = tmp_path / "a", tmp_path / "m.safetensors", tmp_path / "m.onnx"
    code, out, _ = run("run", TINY, "lora{rank=2};ia3", "--out", adapter)
    assert code == 0 and "4 sites edited" in out and "trainable" in out
    code, out, _ = run("fold", TINY, adapter, "--out", merged)
    assert code == 0 and "original names" in out
    Decoder().load_state_dict(load_file(merged), strict=True)
    code, out, _ = run("export", TINY, "fold", "--adapter", adapter, "--out", model, "--json")
    report = json.loads(out)
    assert code == 0 and model.stat().st_size == report["bytes"]
    assert max(report["parity"].values()) < 1e-5


def test_fold_streams_from_a_directory_of_weights(run: Any, tmp_path: Path) -> None:
    """A model that a function makes is folded into the files that are named beside it."""
    adapter, weights, merged = tmp_path / "a", tmp_path / "weights", tmp_path / "m.safetensors"
    weights.mkdir()
    save_file(tiny()[0].state_dict(), weights / "model.safetensors")
    model, example = tiny()
    program = peftfx.run(peftfx.capture(model, kwargs=example), "lora{rank=2}")
    peftfx.save(randomise(program), adapter)
    assert run("fold", TINY, adapter, "--out", merged)[0] == 0
    stream = ("fold", TINY, adapter, "--stream", "--out", tmp_path / "merged")
    code, out, _ = run(*stream, "--weights", weights)
    assert code == 0 and "4 tensors folded" in out
    want, got = load_file(merged), load_file(tmp_path / "merged" / "model.safetensors")
    assert {n: t.tolist() for n, t in got.items()} == {n: t.tolist() for n, t in want.items()}
    assert not torch.equal(got["layers.0.q_proj.weight"], tiny()[0].layers[0].q_proj.weight)
    for args, said in (
        (stream, "Add --weights DIR"), ((*stream, "--weights", adapter / "no"), "safetensors files"),
        (("fold", TINY, adapter, "--out", merged, "--weights", weights), "goes with --stream"),
    ):  # fmt: skip
        code, _, error = run(*args)
        assert code == 2 and said in " ".join(error.split())


def test_a_model_directory(run: Any, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    code, out, _ = run("sites", tmp_path / "bert", "--where", "query")
    assert code == 0 and out.count("attention.self.query") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sites", TINY, "--where", "qq"), "Nearest"),
        (("sites", "nowhere"), "neither a model directory nor module:function"),
        (("sites", "nowhere:f"), "cannot be imported"),
        (("sites", f"{__name__}:broken"), "must return (model, example inputs)"),
        (("run", TINY, "loar"), "Nearest: lora"),
        (("diff", TINY), "needs passes"),
        (("fold", TINY, "nowhere", "--out", "x.safetensors"), "nowhere does not exist"),
        (("export", TINY, "--out", "no/such/folder/x.onnx"), "does not exist"),
        (("search", "query", "--out", "nowhere"), "peftfx demo"),
        (("demo", "--source", "nowhere", "--out", "nowhere"), "nowhere"),
    ],
)
def test_user_errors_are_one_line(run: Any, args: tuple[str, ...], message: str) -> None:
    code, out, err = run(*args)
    assert code == 2 and message in err and not out
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    code, out, _ = run(*args, "--json")
    assert code == 2 and message in json.loads(out)["error"]
