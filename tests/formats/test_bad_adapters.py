"""Adapters that are damaged, of something else, or not what they say: refused, by file, key and
remedy, with nothing changed. Each fault goes onto a program and through conversion without one."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import peftfx
from peftfx.exporters.formats import convert, format_of, load_adapter
from peftfx.rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    CorruptFileError,
    NonFiniteError,
    RewriteError,
)

from ..damage import cuts, flips
from .peft_cases import CASES, base, inputs, output, program
from .test_convert import adapter, directory
from .test_hf_peft import CONFIG, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj"


def copied(case: str, target: Path) -> Path:
    return Path(shutil.copytree(adapter(case)[0], target))


def refused(folder: Path, kind: type[Exception], text: str, name: str = "llama") -> None:
    """By reading and by converting, which leave everything as it was."""
    before = program(name)
    with pytest.raises(kind, match=text):
        load_adapter(before, folder)
    assert not before.adapters and not before.attachments
    target = folder.parent / "converted"
    with pytest.raises(RewriteError, match=text):
        convert(folder, target, "peft", directory(name))
    assert not target.exists() and not list(folder.parent.glob(".*"))


Edit = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def put(key: str, value: Any) -> Edit:
    return lambda config, tensors: config.update({key: value})


def rename(old: str, new: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def fill(leaf: str, value: float) -> Edit:
    return lambda config, tensors: tensors[f"{QUERY}.{leaf}"].view(-1)[3:4].fill_(value)


def cut(leaf: str, rows: int) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{QUERY}.{leaf}"] = tensors[f"{QUERY}.{leaf}"][:rows].contiguous()

    return edit


A, B = "lora_A.weight", "lora_B.weight"

EDITS: dict[str, tuple[Edit, type[Exception], str]] = {
    "another prefix": (rename(PREFIX, "model.model."), ArtifactError,
                       rf"{CONFIG}: the key 'model.model.*does not start with.*rename the keys"),
    "one prefix too many": (rename(PREFIX, PREFIX * 2), ArtifactError, "no such module"),
    "no prefix": (rename(PREFIX, ""), ArtifactError, "does not start with"),
    "not a number": (fill(A, float("nan")), NonFiniteError,
                     rf"{WEIGHTS}: {QUERY}.{A} holds NaN or infinity, first at \[0, 3\]. Save it"),
    "infinite": (fill(B, float("-inf")), NonFiniteError, rf"{QUERY}.{B} holds NaN or infinity"),
    "unknown type": (put("peft_type", "LORAX"), ArtifactError,
                     rf"{CONFIG}: adapters of type LORAX are not read. Nearest that are: LORA"),
    "a type of another sort": (put("peft_type", 3), ArtifactError, "there is no peft_type"),
    "a newer option": (put("use_warp", True), ArtifactError,
                       rf"{CONFIG}: the option use_warp=True of LORA is not understood.*write it wi"),
    "a newer option off": (put("rank_schedule", [1, 2]), ArtifactError, "rank_schedule"),
    "a newer number": (put("new_scale", 0), ArtifactError, "the option new_scale=0 of LORA is not"),
    "no magnitudes": (put("use_dora", True), ArtifactError,
                      "use_dora=true, but .*lora_magnitude_vector is missing"),
    "no biases": (put("lora_bias", True), ArtifactError, "lora_bias=true, but .*lora_B.bias is mis"),
    "rank of the config": (put("r", 8), ArtifactError,
                           "the rank of .*q_proj is 8, but its tensors have 4.*save the adapter again"),
    "rank of a pattern": (put("rank_pattern", {"q_proj": 2}), ArtifactError, "is 2, but its ten"),
    "rank of one factor": (cut(A, 2), ArtifactError, r"\[2, 32\] and lora_B.weight \[32, 4\]"),
    "no rank": (put("r", 0), ArtifactError, "is 0, but its tensors have 4"),
    "a rank as text": (put("r", "4"), ArtifactError, "r must be int, not '4'"),
    "rows of the weight": (cut(B, 20), BaseMismatchError, "/a: .*adapter has .*does not fit.*Use"),
    "a module of no model": (rename("q_proj", "query_key_value"), ArtifactError,
                             "changes 'model.layers.0.self_attn.query_key_value', and this model has "
                             "no such module.*Use the base"),
    "a fused module": (rename("self_attn.q_proj", "self_attn.qkv_proj"), ArtifactError,
                       "qkv_proj.*no such module"),
    "a module without a weight": (rename("self_attn.q_proj", "self_attn"), ArtifactError,
                                  "'model.layers.0.self_attn', and this model has no such module"),
    "a parameter of no model": (lambda c, t: t.update({f"{PREFIX}score.weight": torch.ones(2, 2)}),
                                ArtifactError, "score.weight' belongs to no layer of LORA"),
    "a half": (lambda c, t: t.pop(f"{QUERY}.{B}"), ArtifactError, f"q_proj.{B} is missing beside"),
    "nothing": (lambda c, t: t.clear(), ArtifactError, "the adapter holds nothing"),
    "numbers of another kind": (lambda c, t: t.update({f"{QUERY}.{A}": torch.ones(4, 32).long()}),
                                ArtifactError, "factors of int64 and float32"),
    "flat factors": (lambda c, t: t.update({f"{QUERY}.{A}": torch.ones(128)}), RewriteError,
                     "no matrices of one rank"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(EDITS))
def test_an_altered_adapter_is_refused(fault: str, tmp_path: Path) -> None:
    edit, kind, text = EDITS[fault]
    folder = copied("lora", tmp_path / "a")
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    edit(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    refused(folder, kind, text)


def test_factors_of_eight_bits_are_checked_and_read(tmp_path: Path) -> None:
    folder, low = copied("lora", tmp_path / "a"), torch.float8_e4m3fn
    tensors = {n: t.to(low) for n, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    got = load_adapter(program("llama"), folder)
    save_file({n: t.float() for n, t in tensors.items()}, folder / WEIGHTS)
    same = load_adapter(program("llama"), folder)
    assert torch.equal(output(got(**inputs("llama"))), output(same(**inputs("llama"))))
    tensors[f"{QUERY}.{A}"] = torch.full((4, 32), float("nan")).to(low)
    save_file(tensors, folder / WEIGHTS)
    refused(folder, NonFiniteError, "holds NaN or infinity")


def test_older_files_need_no_base(tmp_path: Path) -> None:
    folder = copied("lora", tmp_path / "a")
    convert(folder, tmp_path / "want", "plain-lora")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    convert(folder, tmp_path / "got", "plain-lora")
    want, got = (load_file(tmp_path / n / WEIGHTS) for n in ("want", "got"))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ArtifactError, match="is missing: the adapter is not whole"):
        convert(folder, tmp_path / "got", "plain-lora")


def test_another_base_is_refused(tmp_path: Path) -> None:
    """By its names, and, of our own adapters, by its values."""
    refused(copied("lora", tmp_path / "a"), ArtifactError, "no such module", "bert")
    peftfx.save(peftfx.run(program("llama"), "lora{rank=2,where=q}"), tmp_path / "ours")
    other = base("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    moved = peftfx.capture(other, kwargs=inputs("llama"))
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_adapter(moved, tmp_path / "ours")


def test_a_fused_adapter_on_an_unfused_model(tmp_path: Path) -> None:
    """GPT-2's three projections in one, on a model that has them apart, and the other way round."""
    refused(copied("fused", tmp_path / "a"), ArtifactError,
            rf"{CONFIG}: the adapter changes '.*c_attn'.*no such module.*Use the base")  # fmt: skip
    refused(copied("lora", tmp_path / "b"), ArtifactError, "q_proj.*no such module", "gpt2")
    folder = copied("lora", tmp_path / "c")
    tensors = load_file(folder / WEIGHTS)
    key = f"{PREFIX}model.layers.0.self_attn.qkv_proj.lora_"
    fused = {f"{key}A.weight": torch.ones(4, 32), f"{key}B.weight": torch.ones(64, 4)}
    save_file(tensors | fused, folder / WEIGHTS)
    refused(folder, ArtifactError,
            rf"{CONFIG}: the adapter changes 'model\.layers\.0\.self_attn\.qkv_proj'.*self_attn has "
            r"k_proj, o_proj, q_proj, v_proj.*fused or apart.*Use the base")  # fmt: skip


def doubled(path: Path, start: str, line: str) -> None:
    """A JSON file with a key twice."""
    text = path.read_text()
    assert text.count(start) == 1
    path.write_text(text.replace(start, line + start))


def test_keys_twice(tmp_path: Path) -> None:
    """In the config, and in the header of the tensors, where readers take either one."""
    folder = copied("lora", tmp_path / "a")
    doubled(folder / CONFIG, '"r": 4', '"r": 8,\n  ')
    refused(folder, CorruptFileError, rf"{CONFIG} is not valid JSON: duplicate key 'r'")
    folder = copied("lora", tmp_path / "b")
    raw = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    key = f"{QUERY}.{A}"
    twice = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    data = struct.pack("<Q", len(twice)) + twice.encode() + raw[8 + size :]
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, CorruptFileError, rf"{WEIGHTS}.*duplicate key '{key}'")


def test_offsets_outside_the_file(tmp_path: Path) -> None:
    folder = copied("lora", tmp_path / "a")
    raw = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    for begin, end in ((0, 2**40), (-512, 0), (512, 0), (3, 515)):
        header = json.loads(raw[8 : 8 + size])
        header[f"{QUERY}.{A}"]["data_offsets"] = [begin, end]
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
        refused(folder, CorruptFileError, WEIGHTS)


def test_paths_outside_the_directory(tmp_path: Path) -> None:
    """A base's index that names files elsewhere, and entries that are no files."""
    folder = tmp_path / "base"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(save({"x": torch.ones(1)}))
    for path in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index = {"weight_map": {"x": path}, "metadata": {}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CorruptFileError, match="not a file beside it"):
            convert(adapter("lora")[0], tmp_path / "out", "peft", folder)
    away = copied("lora", tmp_path / "a")
    (away / WEIGHTS).unlink()
    (away / WEIGHTS).mkdir()
    refused(away, ArtifactError, rf"{WEIGHTS} .*directory, not a regular file")
    for name in ("a\0b", str(tmp_path / "nowhere" / "..." / "x")):
        with pytest.raises(ArtifactError, match=r"null character|does not exist"):
            format_of(name)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_cut_and_flipped_files(file: str, tmp_path: Path) -> None:
    """An error of ours that names the file, or an adapter of finite numbers: PEFT's files have no
    checksum, so a flipped digit or mantissa is another adapter."""
    folder = copied("lora", tmp_path / "a")
    good = (folder / file).read_bytes()
    (folder / file).unlink()
    refused(folder, ArtifactError, file)
    for bad in cuts(good, 12):
        (folder / file).write_bytes(bad)
        refused(folder, RewriteError, file)
    counted = 0
    for bad in flips(good, 60):
        (folder / file).write_bytes(bad)
        try:
            convert(folder, tmp_path / "b", "plain-lora", directory("llama"))
        except RewriteError as error:
            counted += 1
            assert str(folder) in str(error)
            continue
        assert all(t.isfinite().all() for t in load_file(tmp_path / "b" / WEIGHTS).values())
    assert counted >= (30 if file == CONFIG else 1)


LEAVES = {"loha": "hada_w1_b", "lokr": "lokr_w1", "vera": "vera_lambda_d", "shira": "shira_weight",
          "miss": "miss_block", "oft": "oft_R.weight", "boft": "boft_s", "ia3": "ia3_l",
          "adalora": "lora_E", "dora": "lora_magnitude_vector"}  # fmt: skip


@pytest.mark.parametrize("case", list(LEAVES))
def test_tensors_of_other_sizes_or_none(case: str, tmp_path: Path) -> None:
    """Of every type: one tensor of a module too short, then gone."""
    folder, (name, _) = copied(case, tmp_path / "a"), CASES[case]
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k in tensors if k.endswith(LEAVES[case]))
    module = key.removesuffix(f".{LEAVES[case]}").removeprefix(PREFIX)
    short = tensors | {key: tensors[key].flatten()[:1].clone()}
    gone = {k: t for k, t in tensors.items() if k != key}
    for changed in (short, gone):
        save_file(changed, folder / WEIGHTS)
        if case in ("miss", "ia3", "dora", "oft") and changed is gone:
            continue  # then this module simply has none
        before = program(name)
        with pytest.raises(RewriteError, match=module.rpartition(".")[2]):
            load_adapter(before, folder)
        assert not before.adapters
        with pytest.raises(RewriteError):
            convert(folder, tmp_path / "b", "plain-lora", directory(name), rank=4)
        assert not (tmp_path / "b").exists()


def test_prompts_of_other_sizes(tmp_path: Path) -> None:
    folder = copied("prefix", tmp_path / "a")
    save_file({"prompt_embeddings": torch.ones(4, 64)}, folder / WEIGHTS)
    refused(folder, ArtifactError, r"prompt_embeddings is \(4, 64\), which is not 5 tokens")
    folder = copied("prompt", tmp_path / "b")
    save_file({"prompt_embeddings": torch.ones(5, 31)}, folder / WEIGHTS)
    with pytest.raises(BaseMismatchError, match=r"/b: the adapter has .*does not fit this model"):
        load_adapter(program("llama"), folder)
    want = output(program("llama")(**inputs("llama")))
    assert torch.equal(output(program("llama")(**inputs("llama"))), want)
