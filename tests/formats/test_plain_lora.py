"""Any adapter as plain LoRA: the rules of serving engines on its files, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftfx
from peftfx.cli import main
from peftfx.exporters.formats import format_of, load_adapter, save_adapter
from peftfx.rewriter.errors import ArtifactError, OptionError

from ..models import randomise
from .peft_cases import CASES, base, inputs, output, program, write
from .test_hf_peft import CONFIG, WEIGHTS, near

pytestmark = pytest.mark.filterwarnings("ignore")


REFUSED = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "layer_replication", "kasa_config",
    "trainable_token_indices", "megatron_config", "arrow_config",
)  # fmt: skip
"""Options that some of them refuse, or take no notice of."""


def require_plain(folder: Path, rank: int) -> None:
    """What vLLM, SGLang, llama.cpp's converter and Olive ask of a directory."""
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == rank == config["lora_alpha"]
    for key in REFUSED:
        assert not config.get(key), key
    assert config.get("bias", "none") == "none"
    assert config.get("init_lora_weights", True) in (True, False, "gaussian")
    modules, tensors = config["target_modules"], load_file(folder / WEIGHTS)
    assert isinstance(modules, list)  # of names: a pattern, or all-linear, is read by none of them
    named = {k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")}
    assert {f"{n}.lora_{side}.weight" for n in named for side in "AB"} == tensors.keys()
    for name in named:
        assert name.startswith("base_model.model.") and name.endswith(tuple(modules)), name
        a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
        assert len(a) == rank == b.shape[1] and a.dtype == b.dtype
        assert a.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert not (folder / "added_tokens.json").exists()


@pytest.mark.parametrize(
    "case", ["patterns", "rslora", "pissa", "adalora", "vera", "fused", "kasa", "blocks"]
)
def test_low_rank_forms_lose_nothing(case: str, tmp_path: Path) -> None:
    name, _ = CASES[case]
    want = write(case, tmp_path / "a")
    read = peftfx.load_peft(program(name), tmp_path / "a")
    assert not save_adapter(read, tmp_path / "b", "plain-lora")
    rank = json.loads((tmp_path / "b" / CONFIG).read_text())["r"]
    require_plain(tmp_path / "b", rank)
    near(output(load_adapter(program(name), tmp_path / "b")(**inputs(name))), want)


@pytest.mark.parametrize("case", ["dora", "loha", "lokr", "shira", "oft", "miss"])
def test_other_forms_tell_what_they_lose(case: str, tmp_path: Path) -> None:
    name, _ = CASES[case]
    want = write(case, tmp_path / "a")
    read = peftfx.load_peft(program(name), tmp_path / "a")
    assert not save_adapter(read, tmp_path / "full", "plain-lora", rank=32)
    require_plain(tmp_path / "full", 32)
    near(output(load_adapter(program(name), tmp_path / "full")(**inputs(name))), want)
    lost = save_adapter(read, tmp_path / "thin", "plain-lora", rank=2)
    require_plain(tmp_path / "thin", 2)
    assert lost and all(0 < share < 1 for share in lost.values())
    got = output(load_adapter(program(name), tmp_path / "thin")(**inputs(name)))
    assert (got - want).abs().max() > 1e-3


def test_what_trained_here_is_plain(tmp_path: Path) -> None:
    made = randomise(peftfx.run(program("llama"), "adalora{rank=4,where=q|v}"), 0.2)
    lost = save_adapter(made, tmp_path / "a", "plain-lora", rank=4)
    require_plain(tmp_path / "a", 4)
    assert not lost
    near(
        output(load_adapter(program("llama"), tmp_path / "a")(**inputs("llama"))),
        output(made(**inputs("llama"))),
    )


def test_refusals(tmp_path: Path) -> None:
    made = peftfx.run(program("llama"), "lora{rank=2};prompt_tuning{length=2}")
    with pytest.raises(
        ArtifactError,
        match=r"adapter has a prompt\. No weight holds that\. Write it with --to peft",
    ):
        save_adapter(made, tmp_path / "a", "plain-lora", "prompt_tuning")
    with pytest.raises(OptionError, match="no format 'gptq'"):
        save_adapter(made, tmp_path / "a", "gptq", "lora")
    with pytest.raises(OptionError, match="rank=3 goes with plain-lora"):
        save_adapter(made, tmp_path / "a", "peft", "lora", rank=3)
    with pytest.raises(ArtifactError, match="does not exist"):
        format_of(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no adapter that is known"):
        format_of(tmp_path)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("dora", tmp_path / "a")
    base("llama").save_pretrained(tmp_path / "model")
    found = str(tmp_path / "model"), str(tmp_path / "a")
    model, adapter = found
    command = ["convert", adapter, "--base", model]
    assert main([*command, str(tmp_path / "b"), "--to", "plain-lora", "--rank", "2"]) == 0
    said = capsys.readouterr().out
    assert "as plain-lora" in said and "lost a share of their norm" in said
    assert main([*command, str(tmp_path / "c"), "--to", "peftfx"]) == 0
    assert format_of(tmp_path / "c") == "peftfx"
    merged = str(tmp_path / "merged.safetensors")
    assert main(["fold", *found, "--out", merged]) == 0
    folded = base("llama")
    folded.load_state_dict(load_file(merged))
    read = peftfx.load_peft(program("llama"), tmp_path / "a")
    with torch.no_grad():
        near(output(folded(**inputs("llama"))), output(read(**inputs("llama"))))
