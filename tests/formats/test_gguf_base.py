"""GGUF files as bases, and whole directories: what transformers loads of both is one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftfx
from peftfx.cli import main
from peftfx.directories import to_directory
from peftfx.exporters.formats import save_adapter
from peftfx.exporters.gguf import base as gguf_base
from peftfx.exporters.gguf.base import load_gguf, write_directory
from peftfx.models import load_model
from peftfx.rewriter.errors import ArtifactError, OptionError, RewriteError

from ..damage import cuts
from ..models import randomise
from .gguf_files import load, write_base, write_lora, written
from .peft_cases import base, inputs, output, write
from .test_hf_peft import near

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return output(model(**inputs("llama")))


def reload(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def qwen2(**options: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    made = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **options,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def llama() -> Any:
    """With widths that all are in blocks of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tensors of every type."""
    return write_base(
        tmp_path_factory.mktemp("mixed") / "model.gguf", llama(), kinds=lambda name: next(
            (t for t, part in zip(TYPES, ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_down", "embd"),
                                  strict=True) if part in name), "Q8_0"),
    )  # fmt: skip


def test_a_file_is_the_directory_that_is_written_of_it(mixed: Path, tmp_path: Path) -> None:
    """Every tensor as transformers has it, bit for bit, in shards."""
    done = write_directory(mixed, tmp_path, shard=20_000)
    theirs = load(mixed)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not done.notes
    ours = reload(tmp_path)
    assert done.tensors == len(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(llama()))  # it was quantised
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    for got in (ours, load_gguf(mixed)):
        assert (got.generation_config.bos_token_id, got.generation_config.eos_token_id) == (3, 63)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)("AB!")["input_ids"] == [63, 4]
    ours.half(), ours.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("tied", [False, True])
def test_an_architecture_without_pairs(tied: bool, tmp_path: Path) -> None:
    """Biases, too; a tied head is not in the file."""
    model = qwen2(tie_word_embeddings=tied)
    path = write_base(tmp_path / "model.gguf", model, "qwen2", tokens=False)
    done = write_directory(path, folder := tmp_path / "out")
    assert done.notes == ["no tokenizer: the file has none"]
    ours = reload(folder)
    assert torch.equal(logits(ours), logits(model))
    assert torch.equal(logits(load_gguf(path)), logits(model))
    assert ours.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_k_quants(tmp_path: Path) -> None:
    """No package writes them, so the blocks are drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )).eval()  # fmt: skip
    path = write_base(tmp_path / "plain.gguf", model, tokens=False)
    reader, config = gguf.GGUFReader(path), model.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length",
                "attention.head_count", "attention.head_count_kv", "vocab_size"):  # fmt: skip
        writer.add_uint32(f"llama.{key}", reader.get_field(f"llama.{key}").contents())  # pyright: ignore
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    draw = np.random.default_rng(0)
    kinds = {"attn_q": "Q4_K", "attn_v": "Q5_K", "ffn_up": "Q6_K", "ffn_down": "Q2_K"}
    for tensor in reader.tensors:
        name = next((k for part, k in kinds.items() if part in tensor.name), "F32")
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if name == "F32":
            writer.add_tensor(tensor.name, tensor.data)
            continue
        blocks = draw.integers(0, 256, (256 * 256 // block, size), np.uint8)
        halves = np.full((len(blocks), 2), 0.01, np.float16).view(np.uint8)
        at = {"Q4_K": 0, "Q5_K": 0, "Q6_K": size - 2, "Q2_K": size - 4}[name]
        blocks[:, at : at + 4] = halves[:, : size - at]
        writer.add_tensor(tensor.name, blocks.reshape(256, -1), raw_dtype=kind)
    path = written(writer, tmp_path / "model.gguf")
    write_directory(path, tmp_path / "out")
    theirs, ours = load(path).state_dict(), reload(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[n], t) and bool(torch.isfinite(t).all()) for n, t in theirs.items())


def test_what_transformers_turns_it_turns(tmp_path: Path) -> None:
    """GPT-2's products are stored turned round: the model is in memory as a whole."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=64, n_embd=32, n_head=4, n_layer=1, n_positions=32, bos_token_id=0, eos_token_id=1,
    )).eval()  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_context_length(32), writer.add_embedding_length(32), writer.add_block_count(1)
    writer.add_head_count(4), writer.add_feed_forward_length(128), writer.add_vocab_size(64)
    writer.add_layer_norm_eps(1e-5), writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(64)]), writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 1)
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        turned = tensor.T if tensor.dim() == 2 and ".c_" in name else tensor
        if name != "lm_head.weight":
            writer.add_tensor(
                f"{names.get_name(module)}.{leaf}", np.ascontiguousarray(turned.numpy())
            )
    path = written(writer, tmp_path / "model.gguf")
    done = write_directory(path, tmp_path / "out")
    assert any("in memory as a whole" in note for note in done.notes)
    near(logits(reload(tmp_path / "out")), logits(model))


def test_norms_that_are_stored_with_one_added(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )).eval()  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.add_context_length(128), writer.add_embedding_length(32), writer.add_block_count(1)
    writer.add_feed_forward_length(32), writer.add_head_count(4), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6), writer.add_key_length(8), writer.add_value_length(8)
    writer.add_vocab_size(64), writer.add_sliding_window(4096)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            module, _, leaf = name.rpartition(".")
            if name != "lm_head.weight":
                tensor.add_(torch.randn_like(tensor) * 0.1)
                stored = tensor + 1 if "norm" in name else tensor
                writer.add_tensor(f"{names.get_name(module)}.{leaf}", stored.numpy())
    path = written(writer, tmp_path / "model.gguf")
    done = write_directory(path, tmp_path / "out")
    assert done.notes == ["no tokenizer: the file has none"]
    ours, theirs = reload(tmp_path / "out").state_dict(), load(path).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], theirs[name]), name
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=3e-7)


ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROTATIONS))
def test_scaled_rotations_stay_scaled(kind: str, tmp_path: Path) -> None:
    """transformers drops them without a word when it reads a file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    about = {"rope_theta": 500000.0, **ROTATIONS[kind]}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64,
        rope_parameters=about, initializer_range=0.5,
    )).eval()  # fmt: skip
    fields: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": about["factor"]}
    changes: dict[str, Tensor] = {}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = 16.0
    if kind == "llama3":  # factors by which each frequency is divided
        fields, plain = {}, 500000.0 ** (-torch.arange(0, 64, 2) / 64)
        changes = {"rope_freqs.weight": plain / model.model.rotary_emb.inv_freq}
    path = write_base(tmp_path / "m.gguf", model, fields=fields, changes=changes, tokens=False)
    write_directory(path, tmp_path / "out")
    for got in (load_gguf(path), reload(tmp_path / "out")):
        near(logits(got), logits(model))
    assert (logits(load(path)) - logits(model)).abs().max() > 1e-3  # without us


def test_other_rotations_are_refused(tmp_path: Path) -> None:
    odd = {"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    path = write_base(tmp_path / "m.gguf", base("llama"), changes=odd)
    with pytest.raises(ArtifactError, match=r"not those of Llama 3\.1"):
        load_gguf(path)
    fields = {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}
    path = write_base(tmp_path / "n.gguf", base("llama"), fields=fields)
    with pytest.raises(ArtifactError, match=r"rope\.scaling\.type is 'longrope'"):
        load_gguf(path)


def test_a_name_decides_nothing(tmp_path: Path) -> None:
    """transformers makes a Mistral with a window of a file that only has that name."""
    from transformers import AutoConfig

    path = write_base(tmp_path / "m.gguf", base("llama"), name="mistral")
    assert AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").sliding_window == 4096
    write_directory(path, tmp_path / "out")
    for got in (load_gguf(path), reload(tmp_path / "out")):
        assert type(got).__name__ == "LlamaForCausalLM"
        near(logits(got), logits(base("llama")))


# An adapter in a base.


@pytest.mark.parametrize("kind", ["ours", "peft", "gguf"])
def test_an_adapter_is_folded_into_a_file(kind: str, mixed: Path, tmp_path: Path) -> None:
    named = load_model(str(mixed))
    program = peftfx.capture(named.model, kwargs=named.example)
    assert getattr(named.model.config, "quantization_config", None) is None
    made = randomise(peftfx.run(program, "lora{rank=2,where=q|ffn.down}"), 0.2)
    save = {"ours": "peftfx", "peft": "peft", "gguf": "gguf"}[kind]
    save_adapter(made, tmp_path / "a", save)
    done = to_directory(mixed, tmp_path / "out", tmp_path / "a")
    assert len(done.changed) == 4 and not done.left_out
    with torch.no_grad():
        want = output(made(**inputs("llama")))
    near(logits(reload(tmp_path / "out")), want)
    assert (want - logits(named.model)).abs().max() > 0.01 * want.abs().max()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_a_directory_of_dense_tensors_loses_the_mark_of_a_file(tmp_path: Path) -> None:
    """With the entry, transformers would refuse to save, halve or train what it loads."""
    model = base("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    mark = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    path.write_text(json.dumps(config | {"quantization_config": mark}))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    want = write("patterns", tmp_path / "adapter")
    done = to_directory(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    assert done.changed and (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    got = reload(tmp_path / "out")
    near(logits(got), want)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    got.half().save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_model_read_by_transformers_is_saved_without_the_mark(
    mixed: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mixed.parent, gguf_file=mixed.name).eval()
    assert model.config.quantization_config is not None
    program = peftfx.capture(model, kwargs=inputs("llama"))
    folded = peftfx.run(randomise(peftfx.run(program, "lora{rank=2,where=q}")), "fold")
    peftfx.as_hf(folded, model.config).save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    reload(tmp_path / "out").half()


def test_memory_holds_one_tensor(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is read before the one before it is written."""
    import weakref

    alive: list[Any] = []
    read = gguf_base.GgufFile.tensor

    def counted(file: Any, name: str) -> Tensor:
        assert sum(ref() is not None for ref in alive) == 0, name
        tensor = read(file, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(gguf_base.GgufFile, "tensor", counted)
    write_directory(mixed, tmp_path)
    assert len(alive) == 21


def test_on_the_command_line(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(mixed), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["sites", str(mixed), "--where", "q"]) == 0
    assert "2 of" in capsys.readouterr().out
    near(logits(reload(tmp_path / "hf")), logits(load(mixed)))
    for args, text in (
        (["convert", str(mixed), str(tmp_path / "x"), "--to", "gguf"], "Give the base"),
        (
            ["convert", str(tmp_path / "hf"), str(tmp_path / "x"), "--to", "hf"],
            "writes a whole model",
        ),
    ):
        assert main(args) == 2
        assert text in " ".join(capsys.readouterr().err.split())


# Bad input.


def bad_config(path: Path, **fields: Any) -> Path:
    data = path.read_bytes()
    for old, new in fields.items():
        data = data.replace(old.encode(), new)
    path.write_bytes(data)
    return path


def test_files_of_other_tensors_are_refused(tmp_path: Path) -> None:
    model = base("llama")
    for name, change, text in (
        ("missing", {"blk.1.attn_q": b"blk.1.attn_x"}, r"lacks 'blk.1.attn_q.weight'"),
        ("extra", {"output_norm": b"outputXnorm"}, r"lacks 'output_norm.weight'"),
    ):
        path = bad_config(write_base(tmp_path / f"{name}.gguf", model), **change)
        with pytest.raises(ArtifactError, match=text):
            write_directory(path, tmp_path / name)
        with pytest.raises(ArtifactError, match="lacks the model's model"):
            load_gguf(path)
    path = write_base(tmp_path / "more.gguf", model, changes={"blk.0.extra.weight": torch.ones(3)})
    with pytest.raises(ArtifactError, match=r"no place for 'blk.0.extra.weight'"):
        write_directory(path, tmp_path / "more")
    nan = {"blk.0.attn_v.weight": torch.tensor(float("nan"))}
    path = write_base(tmp_path / "nan.gguf", model, changes=nan)
    with pytest.raises(RewriteError, match=r"nan.gguf: blk.0.attn_v.weight.*NaN"):
        to_directory(path, tmp_path / "nan")
    path = write_base(tmp_path / "odd.gguf", model, "nobody")
    with pytest.raises(ArtifactError, match="no configuration of architecture 'nobody'"):
        load_gguf(path)
    path = write_lora(tmp_path / "lora.gguf", {}, 1.0)
    with pytest.raises(ArtifactError, match=r"general\.type 'adapter', not a model"):
        load_gguf(path)
    assert not (tmp_path / "nan").exists()


def test_cut_files_are_refused(mixed: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for bad in cuts(mixed.read_bytes(), 12):
        path.write_bytes(bad)
        with pytest.raises(RewriteError, match=r"a\.gguf"):
            load_gguf(path)


def test_nothing_to_fold(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no adapter to fold"):
        to_directory(tmp_path, tmp_path / "out")
