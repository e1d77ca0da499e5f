"""Bases whose files hold in pieces what their models hold whole: Mixtral's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftfx
from peftfx import directories, many
from peftfx.directories import to_directory
from peftfx.exporters.hf_names import checkpoint_of
from peftfx.models import load_model
from peftfx.rewriter.errors import BaseMismatchError, WeightsError

from ..test_stream import tree
from .peft_cases import IDS, MODELS

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
    "num_experts_per_tok": 2,
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, an adapter of PEFT for each of `ADAPTERS`, and `wanted` logits."""
    import peft
    import transformers

    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))
    model.save_pretrained(folder / "base", max_shard_size="6KB")
    wanted: dict[str, Tensor] = {}
    for name, options in ADAPTERS.items():
        model = transformers.MixtralForCausalLM.from_pretrained(folder / "base")
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
        adapted.save_pretrained(folder / name)
        wanted[name] = adapted.eval()(IDS).logits.detach()
    torch.save(wanted, folder / "wanted")
    return folder


def require_folded(mixtral: Path, name: str, out: Path) -> None:
    """The logits that PEFT gives, in files with the names of the base's."""
    import transformers

    want: Tensor = torch.load(mixtral / "wanted")[name]
    got = transformers.MixtralForCausalLM.from_pretrained(out).eval()(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    shards = sorted(p.name for p in (mixtral / "base").glob("*.safetensors"))
    assert len(shards) > 4 and sorted(p.name for p in out.glob("*.safetensors")) == shards
    for file in shards:
        assert [*load_file(out / file)] == [*load_file(mixtral / "base" / file)]
    changed = json.loads((out / "peftfx-fold.json").read_text())["changed"]
    experts = [n for n in changed if ".block_sparse_moe.experts.2.w3.weight" in n]
    assert len(experts) == (SIZES["num_hidden_layers"] if name == "experts" else 0)


@pytest.mark.parametrize("name", [*ADAPTERS])
def test_an_adapter_of_peft_is_folded_into_pieces(
    mixtral: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a capture where it is of linears; what was killed goes on with the same bytes."""
    if name == "attention":
        monkeypatch.setattr(directories, "capture", None)
    out = tmp_path / "whole"
    to_directory(mixtral / "base", out, mixtral / name)
    require_folded(mixtral, name, out)
    seen: list[str] = []

    def interrupt(file: str) -> None:
        seen.append(file)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_directory(mixtral / "base", tmp_path / "again", mixtral / name, progress=interrupt)
    done = to_directory(mixtral / "base", tmp_path / "again", mixtral / name)
    assert len(done.resumed) == 4
    assert tree(tmp_path / "again") == tree(out)


def test_many_adapters_and_a_program_of_ours(mixtral: Path, tmp_path: Path) -> None:
    """By `fold-all`; and from a program with values, which the files are compared with."""
    done = many.fold_all(mixtral / "base", [mixtral / n for n in ADAPTERS], tmp_path / "all")
    assert [d.status for d in done] == ["done", "done"]
    for name in ADAPTERS:
        require_folded(mixtral, name, tmp_path / "all" / name)
    named = load_model(str(mixtral / "base"))
    model: Any = named.model
    program = peftfx.capture(model, kwargs=named.example)
    files = checkpoint_of(mixtral / "base", model)
    adapted = peftfx.load_peft(program, mixtral / "experts")
    peftfx.save(adapted, tmp_path / "ours")
    peftfx.fold_checkpoint(program, files, tmp_path / "own", adapter=tmp_path / "ours")
    require_folded(mixtral, "experts", tmp_path / "own")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, 3, 4] += 1
    other = peftfx.load_peft(peftfx.capture(model, kwargs=named.example), mixtral / "experts")
    with pytest.raises(BaseMismatchError, match=r"layers.1.block_sparse_moe.experts.2.w1.weight"):
        peftfx.fold_checkpoint(other, files, tmp_path / "no")
    peftfx.save(other, tmp_path / "theirs")
    with pytest.raises(BaseMismatchError, match="experts"):
        peftfx.fold_checkpoint(program, files, tmp_path / "no", adapter=tmp_path / "theirs")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama"])
def test_pieces_make_up_the_tensors_of_the_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    files = checkpoint_of(tmp_path, model.to("meta"))
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    names = files.places(loaded, {}, {n: t.to("meta") for n, t in loaded.items()})
    assert bool(files.pieces) == (name == "qwen3_moe")
    for first, stored in names.items():
        assert torch.equal(files.mapped(stored), loaded[first]), first


def test_what_is_not_known_is_refused(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers does not tell, or tells of copies."""
    from transformers import core_model_loading

    for told in (lambda *_: {}, lambda _, state: {n: t + 0 for n, t in state.items()}):
        monkeypatch.setattr(core_model_loading, "revert_weight_conversion", told)
        with pytest.raises(WeightsError, match="other names than the model"):
            to_directory(mixtral / "base", tmp_path / "out", mixtral / "attention")
    assert not (tmp_path / "out").exists()
