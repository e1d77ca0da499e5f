"""`peftfx merge`: mergekit's configurations give mergekit's numbers, whatever happens meanwhile."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftfx.cli import main
from peftfx.exporters import merge as merging
from peftfx.exporters.merge import merge
from peftfx.exporters.mergekit import read_config
from peftfx.rewriter.errors import (
    ArtifactError,
    CorruptFileError,
    NonFiniteError,
    OptionError,
    WeightsError,
)
from peftfx.rewriter.files import job
from peftfx.rewriter.storage.safetensors_checkpoint import Checkpoint

from .toys import ABOUT, config, tensors, three, write

ROUNDED = {"linear_bf16": torch.bfloat16}


def read(folder: Path) -> dict[str, Tensor]:
    files = Checkpoint.read(folder)
    return {n: files.tensor(n) for n in files.entries}


@pytest.mark.parametrize("name", list(ABOUT["merges"]))
def test_the_numbers_are_mergekits(name: str, tmp_path: Path) -> None:
    done = merge(config(three(tmp_path, shards=3), name), tmp_path / "out")
    got, want, base = read(tmp_path / "out"), tensors(name), tensors("base")
    assert got.keys() == want.keys() and done.tensors == len(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype == ROUNDED.get(name, torch.float32)
        torch.testing.assert_close(got[key], tensor, rtol=2e-6, atol=2e-7, msg=key)
        assert key not in base or not torch.equal(got[key].float(), base[key]), key


def test_the_directory_is_a_model(tmp_path: Path) -> None:
    path = config(three(tmp_path, shards=2), "linear_bf16")
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    names = {p.name for p in out.iterdir()}
    assert names == {
        "README.md", "config.json", "tokenizer.json", "model.safetensors.index.json", "mergekit_config.yml",
        "peftfx_merge.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    said = json.loads((out / "config.json").read_text())
    assert said["dtype" if "dtype" in said else "torch_dtype"] == "bfloat16"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert "nothing to do" in str(merge(path, out).notes)
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, read(out)["model.layers.0.mlp.up_proj.weight"])


def test_stacked_layers_are_a_model(tmp_path: Path) -> None:
    three(tmp_path, shards=2)
    for name, kinds in (("a", "xyz"), ("b", "uvw")):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": [*kinds]}))
    done = merge(config(tmp_path, "stacked"), tmp_path / "out")
    assert done.tensors == len(tensors("base")) + 9 == len(read(tmp_path / "out"))
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["num_hidden_layers"] == 4 and said.pop("layer_types") == ["x", "y", "v", "w"]
    largest = max(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors"))
    assert all(p.stat().st_size < 1.5 * largest for p in (tmp_path / "out").glob("*.safetensors"))
    assert "4 layers stacked" in (tmp_path / "out" / "README.md").read_text()

    import transformers

    (tmp_path / "out" / "config.json").write_text(json.dumps(said))
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": None}))
    with pytest.raises(WeightsError, match=r"config\.json of b does not say layer_types"):
        merge(tmp_path / "merge.yml", tmp_path / "more")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    scaled = model.state_dict()["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(scaled, tensors("b")["model.layers.2.mlp.up_proj.weight"] * 0.5)
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="says no number of layers"):
        merge(tmp_path / "merge.yml", tmp_path / "more")
    held = {n: t.clone() for n, t in tensors("b").items() if n != "lm_head.weight"}
    write(tmp_path / "tied", "b", held)
    write(tmp_path / "tied", "a")
    with pytest.raises(WeightsError, match=r"do not both store 'lm_head\.weight'"):
        merge(config(tmp_path / "tied", "stacked"), tmp_path / "more")


def test_the_card_says_what_was_merged(tmp_path: Path) -> None:
    path = config(three(tmp_path), "ties")
    path.write_text(path.read_text() + "\n# ours\n")
    (tmp_path / "base" / "README.md").write_text("about another")
    merge(path, tmp_path / "out", seed=5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        card.startswith('---\nbase_model:\n- "a"\n- "b"\n- "base"\n')
        and "about another" not in card
    )
    assert "of a, b, merged by `ties`, onto base" in card and "drawn: 5" in card
    assert "# ours" in card  # all of the configuration


def test_masks_in_eight_bits_change_no_number(tmp_path: Path) -> None:
    path = config(three(tmp_path), "ties")
    merge(path, tmp_path / "out")
    asked = yaml.safe_load(path.read_text())
    asked["parameters"] = {**asked.get("parameters", {}), "int8_mask": True}
    path.write_text(yaml.safe_dump(asked))
    merge(path, tmp_path / "again")
    assert all(
        torch.equal(t, read(tmp_path / "again")[n]) for n, t in read(tmp_path / "out").items()
    )


def test_sixteen_bits_are_rounded_once(tmp_path: Path) -> None:
    """TIES in bfloat16 is that in float32, rounded; mergekit rounds at every step."""
    halves = {m: {n: t.bfloat16() for n, t in tensors(m).items()} for m in ("base", "a", "b")}
    for name, held in halves.items():
        write(tmp_path / "half", name, held)
        write(tmp_path / "full", name, {n: t.float() for n, t in held.items()})
    for place in ("half", "full"):
        merge(config(tmp_path / place, "ties"), tmp_path / place / "out")
    half, full = (read(tmp_path / p / "out") for p in ("half", "full"))
    assert all(torch.equal(half[n], t.bfloat16()) for n, t in full.items())


def test_random_ones_repeat_by_seed_whatever_the_shards(tmp_path: Path) -> None:
    one, two = three(tmp_path / "one"), three(tmp_path / "two", shards=4)
    runs: list[dict[str, Tensor]] = []
    for place, seed in ((one, 0), (two, 0), (two, 1)):
        out = tmp_path / f"out{len(runs)}"
        merge(config(place, "dare_linear"), out, seed=seed)
        runs.append(read(out))
    assert all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())
    assert not all(torch.equal(t, runs[2][n]) for n, t in runs[0].items())


def test_a_killed_merge_goes_on(tmp_path: Path) -> None:
    path = config(three(tmp_path, shards=3), "dare_ties")
    merge(path, tmp_path / "whole")
    want = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    shards = [len(load_file(p)) for p in sorted((tmp_path / "whole").glob("*.safetensors"))]
    value = merging._Work.value  # pyright: ignore[reportPrivateUsage]
    for stop in range(1, len(tensors("base")), 4):
        calls = 0

        def dies(work: Any, name: str, stop: int = stop) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > stop:
                os._exit(9)
            return value(work, name)

        out = tmp_path / f"out{stop}"
        child = os.fork()
        if child == 0:
            merging._Work.value = dies  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            merge(path, out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not out.exists()
        done = merge(path, out)
        whole = [files for files in itertools.accumulate(shards) if files <= stop]
        assert done.resumed == max(whole, default=0)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == want
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_another_merge_left_is_not_taken(tmp_path: Path) -> None:
    """A folder in use is an error; one of another merge that died is begun again."""
    path, out = config(three(tmp_path), "linear"), tmp_path / "out"
    left = tmp_path / ".out.peftfx-job"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"of another merge")
    handle = os.open(left / job.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ArtifactError, match="being written by another process"):
        merge(path, out)
    os.close(handle)
    merge(path, out)
    got, want = read(out), tensors("linear")
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(three(tmp_path), "linear")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        merge(path, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a", "b", "merge.yml"}


def test_a_head_of_its_own_among_tied_ones(tmp_path: Path) -> None:
    held = tensors("a")
    config_ = ABOUT["model"] | {"tie_word_embeddings": True}
    for name in ("base", "a"):
        own = {n: t for n, t in tensors(name).items() if n != "lm_head.weight"}
        place = write(tmp_path, name, own)
        (place / "config.json").write_text(json.dumps(config_))
    write(tmp_path, "b")
    entry = [{"model": m, "parameters": {"weight": 1.0}} for m in "ab"]
    path = config(tmp_path, {"merge_method": "linear", "models": entry})
    done = merge(path, tmp_path / "out")
    want = (held["model.embed_tokens.weight"] + tensors("b")["lm_head.weight"]) / 2
    torch.testing.assert_close(read(tmp_path / "out")["lm_head.weight"], want)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["tie_word_embeddings"] is False and "tensor of its own" in done.notes[0]


TASK = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters:\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (f"{TASK}      weigth: 1", "line 6: ties's parameters has no key 'weigth'. Nearest: weight"),
        (f"{TASK}      weight: 1\ntokens: 1", "line 7: the configuration has no key 'tokens'"),
        (f"{TASK}      weight: 1\nchat_template: x", "line 7: chat_template is not done here"),
        (f"{TASK}      weight: 1\n      density: 1.5", "line 7: density is a share, from 0 to 1"),
        (f"{TASK}      weight: yes", "line 6: weight is a number, not True"),
        (f"{TASK}      density: 0.5", "ties needs the parameter 'weight' of a"),
        (f"{TASK}      weight: 1\nparameters: {{int8_mask: 3}}", "line 7: int8_mask is true"),
        (f"{TASK}      weight: 1\nparameters: {{gamma: 0.1}}", "line 7: .*no key 'gamma'"),
        (f"{TASK}      weight: [1, {{value: 2}}]", "line 6: weight: a list is of numbers, or of filters"),
        (f"{TASK}      weight: [{{filter: mpl, value: 0}}, {{value: 1}}]",
         "line 6: no tensor's name holds the filter 'mpl'; the first is"),
        (f"{TASK}      weight: 1\ndtype: int8", "line 7: dtype must be one of"),
        (f"{TASK}      weight: 1\n      weight: 2", "key 'weight' at line 7 is given twice"),
        (f"{TASK}      weight: 1\ntokenizer_source: c", "line 7: the tokenizer is"),
        ("merge_method: sce\nmodels: [{model: a}]", "line 1: there is no method 'sce' here"),
        ("merge_method: ties\nmodels: [{model: a}]", "line 1: ties needs a base_model"),
        ("merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
         "parameters: {t: 0.5}", "line 1: slerp goes from the base to one other model, not to 2"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "line 2: .*given twice"),
        ("merge_method: linear\nmodels: []", "line 2: models must be a list"),
        ("merge_method: linear\nmodels: [a]", "line 2: a model must have keys"),
        ("merge_method: linear", "give either models or slices"),
        ("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nslices:\n- sources:\n"
         "  - {model: base, layer_range: [0, 4]}\n  - {model: a, layer_range: [0, 4]}",
         "line 5: layer_range ends at 4, and base has 3 layers"),
        ("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nslices:\n- sources:\n"
         "  - {model: base, layer_range: [0, 1]}\n  - {model: a, layer_range: [0, 2]}",
         "line 5: the sources of a slice have as many layers each, not 1 of base, 2 of a"),
        ("merge_method: ties\nbase_model: base\nparameters: {weight: 0.5}\nslices:\n- sources:\n"
         "  - {model: b, layer_range: [0, 1]}\n  - {model: a, layer_range: [0, 1]}",
         "line 5: the base_model 'base' is not among the sources of this slice"),
        ("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [3, 1]}]",
         r"line 3: layer_range must be \[first layer"),
        ("merge_method: passthrough\nslices:\n- sources: [{model: a}]",
         r"line 3: layer_range must be \[first layer"),
        ("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
         "  residual_weight: 1", "line 4: a slice has no key 'residual_weight'"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b,"
         " parameters: {weight: -1}}]", "sum to 0. Set normalize"),
        ("[", "is not YAML"), ("", "must have keys"), ("{" * 99, "deeper than"),
    ],
)  # fmt: skip
def test_what_a_configuration_cannot_say(text: str, match: str, tmp_path: Path) -> None:
    path = config(three(tmp_path), text=text or " ")
    with pytest.raises(OptionError, match=match):
        merge(path, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a", "b", "merge.yml"}


def _less(held: dict[str, Tensor]) -> None:
    del held["model.norm.weight"]


def _wider(held: dict[str, Tensor]) -> None:
    held["model.norm.weight"] = torch.zeros(9)


def _whole(held: dict[str, Tensor]) -> None:
    held["model.norm.weight"] = torch.zeros(8, dtype=torch.int32)


def _broken(held: dict[str, Tensor]) -> None:
    held["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_less, WeightsError, "b has no tensor 'model.norm.weight'"),
        (_wider, WeightsError, r"'model.norm.weight' is \[8\] in a, \[9\] in b"),
        (_whole, WeightsError, "numbers in one model and of integers"),
        (_broken, NonFiniteError, "model.norm.weight: merged, it holds NaN"),
    ],
)
def test_models_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], None], error: type[Exception], match: str, tmp_path: Path
) -> None:
    path = config(three(tmp_path), "linear")
    held = {n: t.clone() for n, t in tensors("b").items()}
    change(held)
    save_file(held, tmp_path / "b" / "model.safetensors")
    with pytest.raises(error, match=match):
        merge(path, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a", "b", "merge.yml"}


def test_folders_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = config(three(tmp_path), "linear"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        merge(path, out)
    with pytest.raises(ArtifactError, match="is a file"):
        merge(path, path)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "b" / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    with pytest.raises(WeightsError, match="other ids to words"):
        merge(path, tmp_path / "new")
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(CorruptFileError, match="truncated"):
        merge(path, tmp_path / "new")
    (tmp_path / "merge.yml").write_text("merge_method: linear\nmodels: [{model: a+lora}]")
    assert main(["merge", str(path), str(tmp_path / "new"), "--json"]) == 2
    assert "folded first" in json.loads(capsys.readouterr().out)["error"]


def test_gradients_and_filters_as_mergekit_reads_them() -> None:
    text = (
        f"{TASK}      weight: [0, 1, 0.5]\n      density:\n      - {{filter: mlp, value: 0.25}}\n"
        "parameters: {density: 0.75, normalize: [true, false]}\n"
    )
    found = read_config(text, "c.yml")
    for place, weight in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)):
        values = found.values("layers.1.mlp.up", place)
        assert values["a"] == {"weight": weight, "density": 0.25}
        assert values[""]["normalize"] is (place < 1)
    assert found.values("layers.1.attn.q", 0)["a"]["density"] == 0.75
