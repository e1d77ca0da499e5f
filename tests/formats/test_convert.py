"""Conversion without a model: the same tensors as with one, and no number read that nothing needs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftfx
from peftfx.cli import main
from peftfx.exporters.base import checkpoint
from peftfx.exporters.formats import convert, load_adapter, save_adapter
from peftfx.rewriter.errors import ArtifactError, CorruptFileError, OptionError

from ..temporary import lasting
from .peft_cases import CASES, base, inputs, output, program, write
from .test_hf_peft import CONFIG, WEIGHTS, near
from .test_plain_lora import require_plain

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def directory(name: str) -> Path:
    """The model, saved."""
    folder = lasting("base")
    base(name).save_pretrained(folder)
    return folder


@functools.cache
def adapter(case: str) -> tuple[Path, Tensor]:
    folder = lasting("peft")
    return folder, write(case, folder)


def same(one: Path, other: Path) -> None:
    theirs, ours = (load_file(f / WEIGHTS if f.is_dir() else f) for f in (one, other))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]) and tensor.dtype == ours[key].dtype, key


FACTORS = ["patterns", "rslora", "adalora", "encoder-decoder", "unet", "fused"]
"""Low-rank forms, whose own shapes tell all."""

NUMBERS = ["pissa", "olora", "dora", "fused dora", "oft", "own biases"]
"""Forms that depend on the base's numbers."""

SIZES = [
    "loha", "lokr", "vera", "shira", "miss", "head", "table", "ia3", "norms", "prompt", "prefix",
]  # fmt: skip
"""Forms that depend on its sizes or names, or on neither."""

LOSSY = ("dora", "fused dora", "oft", "loha", "shira")


@pytest.mark.parametrize("case", [*FACTORS, *NUMBERS, *SIZES])
def test_files_tell_what_a_program_does(case: str, tmp_path: Path) -> None:
    """Through PEFT's own form, and as plain LoRA where there is one."""
    (source, _), (name, _) = adapter(case), CASES[case]
    read = load_adapter(program(name), source)
    convert(source, tmp_path / "peft", "peft", directory(name))
    same(source, tmp_path / "peft")
    if case in ("own biases", "ia3", "norms", "prompt", "prefix"):
        with pytest.raises(ArtifactError, match="plain LoRA holds changes of weights alone"):
            convert(source, tmp_path / "plain", "plain-lora", directory(name), rank=4)
        assert not (tmp_path / "plain").exists()
        return
    rank = 8 if case in (*LOSSY, "lokr", "miss") else None
    want = save_adapter(read, tmp_path / "want", "plain-lora", rank=rank)
    got = convert(source, tmp_path / "plain", "plain-lora", directory(name), rank=rank)
    same(tmp_path / "want", tmp_path / "plain")
    assert got == want and (bool(got) or case not in LOSSY)
    said, ours = (json.loads((tmp_path / f / CONFIG).read_text()) for f in ("want", "plain"))
    assert said == ours


@pytest.mark.parametrize("case", FACTORS)
def test_factors_need_no_base(case: str, tmp_path: Path) -> None:
    (source, want), (name, _) = adapter(case), CASES[case]
    assert not convert(source, tmp_path / "plain", "plain-lora")
    convert(source, tmp_path / "want", "plain-lora", directory(name))
    same(tmp_path / "want", tmp_path / "plain")
    require_plain(tmp_path / "plain", json.loads((tmp_path / "plain" / CONFIG).read_text())["r"])
    near(output(load_adapter(program(name), tmp_path / "plain")(**inputs(name))), want)


@pytest.mark.parametrize("case", ["dora", "pissa", "oft", "shira", "lora bias", "table"])
def test_what_needs_the_base_says_so(case: str, tmp_path: Path) -> None:
    source, _ = adapter(case)
    with pytest.raises(ArtifactError, match=r"--base|no such module"):
        convert(source, tmp_path / "plain", "plain-lora", rank=4)
    assert not list(tmp_path.iterdir())


def test_a_product_of_factors_needs_no_base_and_loses_what_the_rank_cannot_hold(
    tmp_path: Path,
) -> None:
    source, _ = adapter("loha")
    lost = convert(source, tmp_path / "plain", "plain-lora", rank=4)
    assert lost == convert(source, tmp_path / "want", "plain-lora", directory("llama"), rank=4)
    assert lost and all(0 < share < 1 for share in lost.values())
    same(tmp_path / "want", tmp_path / "plain")


def test_only_the_weights_beside_magnitudes_are_read(tmp_path: Path) -> None:
    """All others are not a number, which would be seen."""
    (source, _), folder = adapter("dora"), tmp_path / "base"
    folder.mkdir()
    state = load_file(directory("llama") / "model.safetensors")
    beside = ("q_proj.weight", "v_proj.weight")
    others = {n: torch.full_like(t, torch.nan) for n, t in state.items() if not n.endswith(beside)}
    save_file(state | others, folder / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "a", "plain-lora", folder, rank=4)
    convert(source, tmp_path / "b", "plain-lora", directory("llama"), rank=4)
    same(tmp_path / "a", tmp_path / "b")


def test_a_tied_head_has_the_table_s_numbers(tmp_path: Path) -> None:
    """The file has one of both, the config says that they are tied."""
    import peft
    import transformers

    small: Any = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(small).eval()
    model.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], use_dora=True)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    convert(tmp_path / "a", tmp_path / "b", "plain-lora", tmp_path / "base", rank=2)
    keys = load_file(tmp_path / "b" / WEIGHTS)
    assert "base_model.model.lm_head.lora_A.weight" in keys


def test_files_of_other_libraries(tmp_path: Path) -> None:
    """diffusers to kohya and back to PEFT; mlx to PEFT."""
    generator = torch.Generator().manual_seed(0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    size = base("unet").get_submodule(path).weight.shape
    a, b = (torch.randn(s, generator=generator) for s in ((2, size[1]), (size[0], 2)))
    tensors = {f"unet.{path}.lora_A.weight": a, f"unet.{path}.lora_B.weight": b}
    save_file(tensors, tmp_path / "a.safetensors")
    folder = directory("unet")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    flat = f"lora_unet_{path.replace('.', '_')}"
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{flat}.lora_up.weight"], b)
    convert(tmp_path / "b.safetensors", tmp_path / "c", "plain-lora", folder)
    convert(tmp_path / "a.safetensors", tmp_path / "d", "plain-lora", folder)
    same(tmp_path / "c", tmp_path / "d")
    with pytest.raises(ArtifactError, match="Give the base"):  # underscores hide the dots
        convert(tmp_path / "b.safetensors", tmp_path / "e", "peft")

    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / CONFIG).write_text(json.dumps({"fine_tune_type": "lora"}))
    query = "model.layers.0.self_attn.q_proj"
    factors = {f"{query}.lora_a": torch.randn(32, 2), f"{query}.lora_b": torch.randn(2, 32)}
    save_file(factors, tmp_path / "mlx" / "adapters.safetensors")
    for name, given in (("f", None), ("g", directory("llama"))):
        convert(tmp_path / "mlx", tmp_path / name, "plain-lora", given)
    same(tmp_path / "f", tmp_path / "g")
    got = load_file(tmp_path / "f" / WEIGHTS)
    want = (factors[f"{query}.lora_a"] @ factors[f"{query}.lora_b"]).T * 20
    made = (
        got[f"base_model.model.{query}.lora_B.weight"]
        @ got[f"base_model.model.{query}.lora_A.weight"]
    )
    torch.testing.assert_close(made, want)


def test_another_base_is_refused(tmp_path: Path) -> None:
    """By the names of its tensors, and by their sizes."""
    source, _ = adapter("lora")
    with pytest.raises(ArtifactError, match="no such module with a weight"):
        convert(source, tmp_path / "a", "plain-lora", directory("bert"))
    folder = tmp_path / "base"
    folder.mkdir()
    state = load_file(directory("llama") / "model.safetensors")
    state = {n: t.repeat(1, 2) if "q_proj" in n else t for n, t in state.items()}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"q_proj.weight' does not fit its shape \[32, 64\]"):
        convert(source, tmp_path / "a", "plain-lora", folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptFileError, match="truncated"):
        convert(source, tmp_path / "a", "plain-lora", folder)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("case", ["experts", "attention"])
def test_what_files_do_not_say_is_refused(case: str, tmp_path: Path) -> None:
    (source, _), (name, _) = adapter(case), CASES[case]
    folder = directory(name) if case == "experts" else None
    with pytest.raises(ArtifactError, match="--capture"):
        convert(source, tmp_path / "a", "peft", folder)
    convert(source, tmp_path / "a", "peft", program(name))  # a program is a base, too
    same(source, tmp_path / "a")


def test_what_is_ours_needs_a_program(tmp_path: Path) -> None:
    made = peftfx.run(program("llama"), "lora{rank=2,where=q}")
    peftfx.save(made, tmp_path / "ours")
    source, _ = adapter("lora")
    for start, to in ((tmp_path / "ours", "peft"), (source, "peftfx")):
        with pytest.raises(ArtifactError, match="--capture"):
            convert(start, tmp_path / "a", to, directory("llama"))
    with pytest.raises(OptionError, match="no format"):
        convert(source, tmp_path / "a", "gptq")


def test_the_headers_are_the_model_s(tmp_path: Path) -> None:
    files = checkpoint(directory("llama"))
    state = base("llama").state_dict()
    assert files.base_tensors().keys() == state.keys()
    for name, tensor in files.base_tensors().items():
        assert torch.equal(tensor, state[name]), name


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = str(adapter("dora")[0]), str(directory("llama"))
    where = str(tmp_path / "plain")
    command = ["convert", source, where, "--to", "plain-lora", "--rank", "2"]
    assert main(command) == 2
    assert "Give the base: --base" in capsys.readouterr().err
    assert main([*command, "--base", folder]) == 0
    assert "as plain-lora" in capsys.readouterr().out
    captured = str(tmp_path / "captured")
    assert main([*command[:2], captured, *command[3:], "--base", folder, "--capture"]) == 0
    same(Path(where), Path(captured))
    assert main(["convert", source, str(tmp_path / "p"), "--to", "peftfx"]) == 2
    assert "needs its model. Add --base" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["gguf", "onnx_adapter"])
def test_formats_of_runtimes(to: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf" if to == "gguf" else "onnxruntime")
    (source, want), (name, _) = adapter("patterns"), CASES["patterns"]
    convert(source, tmp_path / "a", to, directory(name))
    save_adapter(load_adapter(program(name), source), tmp_path / "b", to)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    near(output(load_adapter(program(name), tmp_path / "a")(**inputs(name))), want)
    convert(tmp_path / "a", tmp_path / "c", "plain-lora", directory(name))
    near(output(load_adapter(program(name), tmp_path / "c")(**inputs(name))), want)
    if to == "gguf":
        with pytest.raises(ArtifactError, match="Give the base"):
            convert(source, tmp_path / "d", to)
        return
    convert(source, tmp_path / "d", to)
    assert (tmp_path / "d").read_bytes() == (tmp_path / "a").read_bytes()
