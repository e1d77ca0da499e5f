"""The command line as a whole: the page, exit codes, what is told before a model is loaded, tables."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import peftfx
from peftfx import directories, many, programs
from peftfx.cli import CODES, main, parsed
from peftfx.commands import passes
from peftfx.pass_pages import page
from peftfx.programs import dynamic_of
from peftfx.rewriter.errors import (
    BaseMismatchError,
    CorruptFileError,
    NoFormError,
    OptionError,
    PathError,
    RewriteError,
    VerifyError,
    refused,
)
from peftfx.rewriter.pipeline.passes import REGISTRY
from peftfx.terminal import folded

from . import command_line
from .formats.test_convert import adapter, directory
from .models import Decoder, batch, randomise

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = f"{__name__}:tiny"


def tiny() -> Any:
    torch.manual_seed(0)
    return Decoder().eval(), batch()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object) -> tuple[int, Any]:
        code = main([*map(str, args), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def test_the_page_is_current() -> None:
    assert command_line.PAGE.read_text() == command_line.page(), "run python -m tests.command_line"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (VerifyError("x"), "contract"), (OptionError("x"), "usage"), (PathError("x"), "usage"),
        (BaseMismatchError("x"), "base"), (CorruptFileError("x"), "damage"),
        (refused(OSError(28, "No space left on device"), "x"), "system"),
        (refused(OSError(2, "No such file"), "x"), "usage"), (MemoryError(), "system"),
        (torch.OutOfMemoryError("x"), "system"), (OSError(28, "No space"), "system"),
        (FileNotFoundError(2, "No such file"), "usage"), (KeyboardInterrupt(), "interrupted"),
        (KeyError("x"), "internal"), (NoFormError("x"), "usage"),
    ],
)  # fmt: skip
def test_exit_codes(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: str
) -> None:
    def fails(options: Any) -> Any:
        raise error

    monkeypatch.setattr(passes, "command", fails)
    code, said = run("passes")
    assert (code, said["kind"], said["code"]) == (CODES[kind], kind, CODES[kind])


def test_every_error_has_a_kind() -> None:
    def below(cls: type[RewriteError]) -> set[type[RewriteError]]:
        return {cls}.union(*(below(c) for c in cls.__subclasses__()))

    assert {c.kind for c in below(RewriteError)} == {
        "contract",
        "usage",
        "base",
        "damage",
        "system",
    }


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["foldd", "x"], "no command foldd. Nearest: fold"),
        (["sites", "x", "--wher", "q"], "does not take '--wher'. Nearest: --where"),
        (["fold", "x", "y", "--out", "z", "--tied", "untied"], "no --tied untied. Nearest: untie"),
        (["sites", "x", "y"], "does not take 'y'"),
        (["sites"], "required: model"),
        (["memory", "x", "--batch", "three"], "invalid int value: 'three'"),
    ],
)
def test_what_is_typed_wrong_names_the_nearest(typed: list[str], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        parsed(typed)
    assert said in str(caught.value) and "--help" in str(caught.value)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("peftfx 0.")


def test_wrong_words_are_told_before_a_model_is_loaded(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loaded(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(programs, "load_model", loaded)
    monkeypatch.setattr(many, "load_model", loaded)
    monkeypatch.setattr(directories, "load_model", loaded)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    file, full = tmp_path / "full" / "notes.txt", tmp_path / "full"
    lora = adapter("lora")[0]
    calls: list[tuple[tuple[object, ...], str]] = [
        (("run", TINY, "lora", "--out", full), "holds other files"),
        (("run", TINY, "lora", "--out", file), "is a file"),
        (("run", TINY, "lora", "--out", file / "x"), "no folder"),
        (("run", TINY, "loar"), "Nearest: lora"),
        (("run", TINY, "lora{rnk=3}"), "no option 'rnk'. Nearest: rank"),
        (("run", TINY, tmp_path / "no.yaml"), "cannot be read"),
        (("extract", TINY, full, tmp_path / "x"), "Give one: --rank 16"),
        (("sites", TINY, "--where", "q and"), "selector"),
        (("sites", TINY, "--draw", tmp_path / "no" / "x.svg"), "does not exist"),
        (("print", TINY, "--adapter", "nowhere"), "nowhere does not exist"),
        (("print", TINY, "--dynamic", "input_ids"), "--dynamic input_ids:batch,sequence"),
        (("export", TINY, "--out", tmp_path / "x.bin"), "must end in .onnx"),
        (("export", TINY, "--out", tmp_path / "no" / "x.onnx"), "does not exist"),
        (("fold", TINY, lora, "--out", full / "x.bin"), "a .safetensors file, or a directory"),
        (("fold", TINY, lora, "--out", tmp_path / "x"), "--weights DIR"),
        (("fold", directory("llama"), lora, "--out", full), "holds other files"),
        (("fold", directory("llama"), lora, "--stream", "--out", full), "holds other files"),
        (
            ("fold", directory("llama"), lora, "--out", full / "x", "--tied", "untie"),
            "--tied untie",
        ),
        (("convert", lora, full, "--to", "peftfx", "--base", TINY), "holds other files"),
        (("run", TINY, "lora", "--out", tmp_path / ("x" * 240)), "File name too long"),
        (("run", TINY, "lora", "--out", tmp_path / ("x" * 300) / "y"), "File name too long"),
        (("run", TINY, "lora", "--out", ""), "--out is empty"),
        (("export", TINY, "--adapter", "", "--out", tmp_path / "x.onnx"), "--adapter is empty"),
        (("compare", lora, ""), "ADAPTERS is empty"),
        (("export", TINY, "--out", tmp_path / "x.onnx", "--opset", "99"), "no opset 99"),
        (("sites", TINY, "--cache", file), "is a file"),
        (("fold-all", directory("llama"), lora, "--out", file), "is a file"),
        (("fold-all", directory("llama"), lora, "--out", full, "--cache", file), "is a file"),
        (
            (
                *("fold", directory("llama"), lora, "--out", tmp_path / "new"),
                "--draw",
                full / "x.gif",
            ),
            "ends in .svg or .png",
        ),
        (
            (
                *("fold", directory("llama"), lora, "--out", tmp_path / "new"),
                "--draw",
                file / "x.svg",
            ),
            "does not exist",
        ),
        (("demo", "--out", file), "is a file"),
        (("memory", TINY, "lora", "--optimizer", "adma"), "no optimizer 'adma'. Nearest: adam"),
        (("memory", TINY, "lora", "--batch", "0"), "is below 1"),
        (("export", TINY, "--out", tmp_path / "x.onnx", "--tolerance", "-1"), "must be above 0"),
        (("convert", lora, tmp_path / "x", "--to", "plain-lora", "--rank", "0"), "is below 1"),
        (("fold-all", tmp_path / "no", lora, "--out", tmp_path / "new"), "not a directory with"),
        (
            (*("combine", TINY, lora, full, file, "--method", "slerp"), "--out", tmp_path / "new"),
            "slerp goes from one adapter to another",
        ),
    ]
    for call, message in calls:
        code, said = run(*call)
        assert code == 2 and said["kind"] == "usage" and message in said["error"], (call, said)
    assert file.read_text() == "mine" and sorted(p.name for p in full.iterdir()) == ["notes.txt"]


def test_no_permission_is_of_the_system(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    code, said = run("run", TINY, "lora", "--out", tmp_path / "x")
    assert code == 5 and "Permission denied" in said["error"]


def test_sizes_by_name() -> None:
    assert dynamic_of(None) == "auto" and dynamic_of(["none"]) is None
    assert dynamic_of(["ids:batch,-,length", "x:rows"]) == {
        "ids": {0: "batch", 2: "length"}, "x": {0: "rows"},
    }  # fmt: skip
    for wrong in (["ids"], [":batch"], ["ids:"], ["ids:a", "ids:b"]):
        with pytest.raises(OptionError, match="--dynamic"):
            dynamic_of(wrong)


def test_capturing_options(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("--dynamic", "input_ids:batch,words", "--dynamic", "attention_mask:batch,words")
    assert main(["sites", TINY, *names, "--cache", str(tmp_path / "cache")]) == 0
    assert "words" in capsys.readouterr().out and any((tmp_path / "cache").iterdir())
    code, said = run("sites", TINY, "--dynamic", "ids:batch")
    assert code == 2 and "input_ids" in said["error"]


def test_another_base(run: Any, tmp_path: Path) -> None:
    model, example = tiny()
    with torch.no_grad():
        model.layers[0].q_proj.weight.add_(1)  # not that of TINY
    program = peftfx.run(peftfx.capture(model, kwargs=example), "lora{rank=2}")
    peftfx.save(randomise(program), tmp_path / "a")
    code, said = run("fold", TINY, tmp_path / "a", "--out", tmp_path / "m.safetensors")
    assert code == 3 and said["kind"] == "base" and "--allow-base-mismatch" in said["error"]
    assert not (tmp_path / "m.safetensors").exists()
    allow = ("--out", tmp_path / "m.safetensors", "--allow-base-mismatch")
    assert run("fold", TINY, tmp_path / "a", *allow)[0] == 0
    (tmp_path / "a" / "tensors.safetensors").write_bytes(b"x")
    assert run("fold", TINY, tmp_path / "a", *allow)[0] == 4


def test_fold_into_a_directory(run: Any, tmp_path: Path) -> None:
    """With and without --stream: the same files."""
    call = ("fold", directory("llama"), adapter("lora")[0])
    code, said = run(*call, "--out", tmp_path / "whole")
    assert code == 0 and said["records"][-1]["certificate"]["kind"] == "bounded"
    assert run(*call, "--stream", "--out", tmp_path / "stream")[0] == 0
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert names == {p.name for p in (tmp_path / "stream").iterdir()} and "config.json" in names
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "stream"))
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    assert run("check-merge", *call[1:], tmp_path / "whole")[0] == 0


def test_pages_of_passes(run: Any) -> None:
    for name, cls in REGISTRY.items():
        shown = page(cls)
        assert {o.name for o in shown.options} == {f.name for f in fields(cls)}
        assert all(o.meaning and o.type for o in shown.options), name
        assert shown.about and shown.contract
    code, said = run("passes", "lora")
    rank = next(o for o in said["options"] if o["name"] == "rank")
    assert (
        code == 0
        and (rank["type"], rank["default"]) == ("int, or a map from selectors to it", "8")
        and "branch" in rank["meaning"]
    )
    assert "arXiv:2106.09685" in said["source"] and said["example"].startswith("lora{rank=8")
    assert run("passes", "loar")[0] == 2


@pytest.mark.parametrize("width", [60, 200])
def test_tables_fit_the_terminal(width: int) -> None:
    """No line is wider, and every word of every cell can be found."""
    head = ("option", "type", "default", "meaning")
    rows = [
        (o.name, o.type, o.default, o.meaning)
        for cls in REGISTRY.values()
        for o in page(cls).options
    ]
    numbers = ("place", "norm a", "norm b", "cosine", "sign conflicts")
    long = [("model.layers.10.self_attn.q_proj.weight", "0.7115", "1.631", "-0.038", "49.7%")]
    judged = ("tensor", "is", "of the change", "roundings")
    verdicts = [("model.layers.0.mlp.down_proj.weight", "not folded", "0.00523", "4.73e+03")]
    layers = (
        "layer",
        "places",
        "method",
        "rank",
        "alpha",
        "numbers",
        "dtype",
        "norm of the change",
    )
    layer = [("0", "12", "lora", "2", "16", "224", "float32", "2.014")]
    for columns, cells, right in (
        (head, rows, ()), (numbers, long, numbers[1:]), (judged, verdicts, judged[2:]),
        (layers, layer, ("places", "numbers")),
    ):  # fmt: skip
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(folded(columns, cells, right, width))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        text = "".join("".join(line.split()) for line in lines)
        for cell in (c for row in (columns, *cells) for c in row if len(c) < 12):
            assert all(word in text for word in cell.split())
