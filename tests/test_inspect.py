"""`inspect`, `compare` and `check-merge` against what PEFT merges."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftfx
from peftfx.cli import main
from peftfx.comparison import compare
from peftfx.drawing.heat import draw_comparison
from peftfx.drawing.places import kinds_of
from peftfx.exporters.adapter_changes import describe, place_of
from peftfx.exporters.adapterhub.files import read_adapterhub
from peftfx.exporters.base import checkpoint
from peftfx.exporters.formats import in_out_of
from peftfx.rewriter.errors import BaseMismatchError, BaseNeededError, OptionError

from .formats.peft_cases import CASES, base
from .formats.test_convert import adapter, directory
from .formats.write_with_peftfx import program
from .temporary import lasting

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def merged(case: str) -> Path:
    """What PEFT merges, saved as a model."""
    import peft

    model = peft.PeftModel.from_pretrained(base(CASES[case][0]), str(adapter(case)[0]))
    folder = lasting("merged")
    model.merge_and_unload().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object) -> tuple[int, Any]:
        code = main([*map(str, args), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


MERGED = ["patterns", "rslora", "dora", "pissa", "adalora", "ia3", "loha", "oft", "norms", "head",
          "own biases", "fused", "fused dora", "fused ia3", "encoder-decoder", "unet"]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in MERGED if c not in ("norms", "unet")])
def test_norms_are_those_of_what_peft_merges(case: str) -> None:
    folder, model = adapter(case)[0], directory(CASES[case][0])
    found = describe(folder, checkpoint(model, in_out_of(folder)))
    before, after = weights(model), weights(merged(case))
    seen: set[str] = set()
    for place in found.places:
        want = float((after[place.target] - before[place.target]).norm())
        assert place.norm == pytest.approx(want, rel=1e-4), place.target
        seen.add(place.target)
    biases = {n for n in before if n.endswith(".bias") and "ia3" in case}  # scaled with their rows
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed - biases == seen


FACTORS = ["lora", "patterns", "rslora", "adalora", "fused", "encoder-decoder", "loha", "lokr"]


@pytest.mark.parametrize("case", FACTORS)
def test_factors_need_no_base(case: str) -> None:
    folder = adapter(case)[0]
    with_base = describe(folder, checkpoint(directory(CASES[case][0]), in_out_of(folder)))
    alone = describe(folder)
    assert [p.target for p in alone.places] == [p.target for p in with_base.places]
    for one, other in zip(alone.places, with_base.places, strict=True):
        assert one.norm == pytest.approx(other.norm) and one.rank == other.rank


@pytest.mark.parametrize("case", ["ia3", "head", "head saved", "norms", "prompt", "dora", "oft"])
def test_what_depends_on_the_base_says_so(case: str, run: Any) -> None:
    code, said = run("inspect", adapter(case)[0])
    assert code == 0 and said["parameters"] > 0 and said["places"]
    unknown = [p for p in said["places"] if p["norm"] is None]
    assert unknown and all(p["unknown"] for p in unknown)


def test_a_component_of_what_has_none_is_refused(run: Any) -> None:
    code, said = run("inspect", adapter("lora")[0], "--component", "unet")
    assert code == 2 and "goes with a single file" in said["error"]


def test_formats_tell_the_same(run: Any, tmp_path: Path) -> None:
    source, model = adapter("lora")[0], directory("llama")
    want = run("inspect", source)[1]
    files = {"gguf": "x.gguf", "kohya": "x.safetensors", "onnx_adapter": "x.onnx_adapter"}
    for to, name in {**files, "plain-lora": "plain"}.items():
        assert run("convert", source, tmp_path / name, "--to", to, "--base", model)[0] == 0
        got = run("inspect", tmp_path / name)[1]
        assert got["norm"] == pytest.approx(want["norm"], rel=1e-6), to
        assert sorted(p["rank"] for p in got["places"]) == sorted(p["rank"] for p in want["places"])
    code, said = run("compare", source, tmp_path / "x.gguf")
    assert code == 3 and "--base" in said["error"]
    code, said = run("compare", source, tmp_path / "x.gguf", "--base", model)
    assert code == 0 and said["pairs"][0]["cosine"] == pytest.approx(1.0)
    assert said["pairs"][0]["sign_conflicts"] == 0


def test_layers_that_a_base_repeats_need_no_base(tmp_path: Path) -> None:
    folder = shutil.copytree(adapter("lora")[0], tmp_path / "a")
    config = folder / "adapter_config.json"
    said = json.loads(config.read_text()) | {"layer_replication": [[0, 2], [1, 2]]}
    config.write_text(json.dumps(said))
    assert all(p.norm for p in describe(folder).places)


@pytest.mark.parametrize("case", ["head saved", "token rows", "biases"])
def test_one_place_that_needs_the_base_hides_no_other(case: str) -> None:
    """Norms of all factors, and of each other place why there is none."""
    folder = adapter(case)[0]
    with_base = describe(folder, checkpoint(directory(CASES[case][0])))
    want = {p.target: p.norm for p in with_base.places}
    alone = describe(folder)
    told = [p for p in alone.places if p.norm is not None]
    assert told and len(told) == sum(p.method == "lora" for p in with_base.places)
    assert all(p.norm == pytest.approx(want[p.target], rel=1e-6) for p in told)
    rest = [p for p in alone.places if p not in told]
    assert rest and all(p.norm is None and p.unknown == "needs --base" for p in rest)


HUB = {"bert-lora": True, "bert-lora_old": True, "bert-vera": True, "gpt2-lora": True,
       "t5-lora": True, "bert-unipelt": False, "bert-dora": False, "bert-ia3": False,
       "bert-seq_bn": False, "bert-prefix": False, "bert-prompt": False}  # fmt: skip


@pytest.mark.parametrize("case", [*HUB])
def test_adapterhub_tells_what_its_files_do(case: str, run: Any) -> None:
    """LoRA's changes are those of the captured model; of others it says why not."""
    folder = Path(__file__).parent / "formats" / "adapterhub" / case
    said = run("inspect", folder)[1]
    assert said["methods"] and said["places"]
    assert all((p["norm"] is None) == bool(p["unknown"]) for p in said["places"])
    loras = [p for p in said["places"] if p["unknown"] != "no change of a weight"]
    assert all((p["norm"] is not None) == HUB[case] for p in loras)
    assert bool(loras) == (case.rpartition("-")[2] not in ("seq_bn", "prefix", "prompt"))
    if case in ("bert-lora", "gpt2-lora"):
        assert said["about"]["r"] and said["about"]["alpha"]
        parts = read_adapterhub(program(case.partition("-")[0]), folder).parts
        want = sorted(float(place_of(part, None).norm or 0) for part in parts)
        got = sorted(p["norm"] for p in said["places"])
        assert want == pytest.approx(got, rel=1e-6)


def test_our_own(captured: Any, tmp_path: Path) -> None:
    """Norms of what folding adds, from the artifact alone."""
    model, program = captured["decoder"]
    for recipe in (
        "lora{rank=3,alpha=5,where=q}",
        "adalora{rank=3,where=v}",
        "ia3",
        "dora{rank=2}",
    ):
        adapted = peftfx.run(program, recipe)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.trainable_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        peftfx.save(adapted, tmp_path / recipe)
        state = {n: t.detach().clone() for n, t in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        folded = peftfx.run(adapted, "fold").export_state_dict()
        needs = recipe.startswith(("ia3", "dora"))
        alone = describe(tmp_path / recipe)
        assert all((p.norm is None) == needs for p in alone.places)
        found = describe(tmp_path / recipe, checkpoint(tmp_path))
        assert len(found.places) == len(adapted.attachments)
        for place in found.places:
            want = float((folded[place.target].double() - state[place.target].double()).norm())
            assert place.norm == pytest.approx(want, rel=1e-4), place.target


def test_a_comparison_is_that_of_the_whole_matrices() -> None:
    one, two = (describe(adapter(c)[0]) for c in ("patterns", "rslora"))
    found = compare([one, two])
    before, *after = (
        weights(f) for f in (directory("llama"), merged("patterns"), merged("rslora"))
    )
    for name, like in found.likeness[0, 1].items():
        x, y = (a[name] - before[name] for a in after)
        assert like.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-4)
        want = float((x * y < 0).sum() / (x * y != 0).sum())
        assert like.conflict == pytest.approx(want, abs=0.01)
    assert [n for n, norms in found.norms.items() if None in norms] == [
        p.target for p in one.places if "down_proj" in p.target
    ]
    for case, error in (
        ("fused", BaseMismatchError),
        ("ia3", BaseNeededError),
        ("prefix", OptionError),
    ):
        with pytest.raises(error):
            compare([one, describe(adapter(case)[0])])


def test_the_picture(tmp_path: Path) -> None:
    found = compare([describe(adapter(c)[0]) for c in ("patterns", "rslora")])
    draw_comparison(tmp_path / "x.svg", ["one", "two"], found)
    text = (tmp_path / "x.svg").read_text()
    assert text.count("sign conflicts") == 1 and text.count("norm of the change") == 2
    assert "self_attn.q_proj" in text and "layer 0" in text
    names = ["encoder.block.0.q.weight", "decoder.block.0.q.weight", "head.weight"]
    assert list(kinds_of(names).values()) == ["encoder.q", "decoder.q", "head"]


@pytest.mark.parametrize("case", MERGED)
def test_merges_of_peft_are_right(case: str, run: Any) -> None:
    if case == "unet":
        pytest.skip("diffusers saves its weights under another file name")
    code, said = run(
        "check-merge", directory(CASES[case][0]), adapter(case)[0], merged(case), "--all"
    )
    assert code == 0, [t for t in said["tensors"] if t["state"] not in ("equal", "folded")]
    present = [t["present"] for t in said["tensors"] if t["present"] is not None]
    assert present and all(p == pytest.approx(1, abs=1e-3) for p in present)


def test_wrong_merges_are_found(run: Any, tmp_path: Path) -> None:
    model, source = directory("llama"), adapter("lora")[0]
    good, before = (load_file(f / "model.safetensors") for f in (merged("lora"), model))
    name = next(n for n in good if not torch.equal(good[n], before[n]))
    other = next(n for n in good if torch.equal(good[n], before[n]))
    change = good[name] - before[name]
    nudged = good[name].clone()
    nudged[1, 2] += nudged.abs().max() * 1e-4
    cases: list[tuple[str, dict[str, Tensor], str]] = [
        ("twice", {name: before[name] + 2 * change}, "differs"),
        ("nothing", {name: before[name]}, "not folded"),
        ("one entry", {name: nudged}, "differs"),
        ("another tensor", {other: good[other] * 1.001}, "differs"),
        ("not a number", {name: good[name] * float("nan")}, "differs"),
        ("other shape", {name: good[name][:1].clone()}, "other shape"),
        ("more", {"more": torch.ones(2)}, "extra"),
    ]
    for about, changed, state in cases:
        file = tmp_path / "m.safetensors"
        save_file({**good, **changed}, file)
        code, said = run("check-merge", model, source, file)
        assert code == 1 and said["kind"] == "contract" and not said["good"], about
        assert [(t["name"], t["state"]) for t in said["tensors"]] == [(next(iter(changed)), state)]
        if about == "twice":
            assert said["tensors"][0]["present"] == pytest.approx(2, rel=1e-3)
    save_file({n: t for n, t in good.items() if n != other}, tmp_path / "m.safetensors")
    assert (
        run("check-merge", model, source, tmp_path / "m.safetensors")[1]["counts"]["missing"] == 1
    )
    save_file({n: t.bfloat16() for n, t in good.items()}, tmp_path / "m.safetensors")
    assert run("check-merge", model, source, tmp_path / "m.safetensors")[0] == 0


def test_what_files_do_not_tell_is_refused(run: Any) -> None:
    code, said = run("check-merge", directory("llama"), adapter("prefix")[0], directory("llama"))
    assert code == 2 and "no change of a weight" in said["error"]
    code, said = run("check-merge", directory("bert"), adapter("lora")[0], directory("bert"))
    assert code == 3 and said["kind"] == "base"


def test_what_places_share_has_a_name(captured: Any, tmp_path: Path, capsys: Any) -> None:
    """The one vector of SAID lies at no place; what it changes is no number of the file's."""
    adapted = peftfx.run(captured["encoder"][1], "said{dimension=64}")
    peftfx.save(adapted, tmp_path / "said")
    assert main(["inspect", str(tmp_path / "said")]) == 0
    assert "(shared) " in capsys.readouterr().out
    one = describe(tmp_path / "said")
    with pytest.raises(OptionError, match=r"of said is known of a captured model alone\. Fold"):
        compare([one, one])
